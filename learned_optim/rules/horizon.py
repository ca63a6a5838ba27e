"""Adam-like directions whose gains one small network per tensor sets, knowing the run's length.

The untrained rule is Adam (Kingma and Ba 2015) in units of the tensor's scale, with a linear
warm-up and, where the length of the run is known, a cosine to its end. A network of a few hundred
weights, evaluated once per tensor, reads what the last step has shown of the tensor - its scale,
shape and age, how much of its gradient is signal, whether gradients still point where the momenta
do - and the progress of the run. It answers with a factor on the step and with the shares of four
directions. It is trained by evolution strategies on whole runs. Learned optimizers that know how
far the run is go back to VeLO (Metz et al. 2022, arXiv 2211.09760); a network that sets
hyperparameters of a hand-written update to Daniel et al. 2016.

Statistics are those of the step before, so that one pass over the coordinates does everything: a
step costs what Adam's does.

Zero history gives zero update, the update is odd in the history, and a constant factor on the loss
changes nothing. No coordinate moves by more than :attr:`HorizonRule.longest_step` times the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from learned_optim.rules import _basis as basis
from learned_optim.rules import _history as history
from learned_optim.rules._base import State, StepContext
from learned_optim.rules._features import TINY, bias_correction, largest_momentum, momentum_before
from learned_optim.rules._horizon_config import HorizonConfig
from learned_optim.rules._kernel_rule import KernelRule
from learned_optim.rules._schedule import rate_schedule
from learned_optim.rules._segments import Product, Segments

__all__ = ["DIRECTIONS", "HorizonConfig", "HorizonRule"]

DIRECTIONS = 4
# The gradient in units of r is cut off here; the momenta need no such bound.
_LARGEST_RATIO = 3.0
# In longer runs the weight decay is less.
_UNDIMINISHED_STEPS = 4000
_STEP_BOUND, _MIX_BOUND, _LARGEST_COUNT = 3.0, 2.0, 10_000.0


class HorizonRule(KernelRule):
    """Per-tensor gains of four Adam-like directions, with a built-in schedule.

    With ``f``, ``s`` the bias-corrected momenta, ``g`` the gradient and ``r`` the coordinate's root
    mean square,

        update = -rate * scale * exp(a + z)
                 * (f/r + b_1 f/r + b_2 s/r + b_3 g/r + b_4 [f g > 0] f/r)

    where ``rate`` is ``base_step`` times the schedule, and ``a``, bounded by 3, and ``b``, bounded
    by 2, are the network's. The scale is the root mean square of the parameters, at most 0.1, or,
    if that is larger, a quarter of what their shape suggests: of ``1 / sqrt(fan_in)``, at most 0.1,
    and of 0.1 for vectors; of a tall matrix that starts at zero, with ``adapter_power``, less. The
    last direction is the cautious one (Liang et al. 2024, arXiv 2411.16085).

    The trust ``exp(z)`` starts at ``exp(trust_start)`` and grows, to 1 at most, as far as gradients
    go on pointing where the momentum points: at once in a fresh network, and not where weights are
    trained, which the first long steps would destroy. Once it is 1 it stays, unless there is a
    later gain: then it falls, at most with the root of the number of steps, where steps are so long
    that gradients contradict the momentum. It is a bounded hypergradient descent on the log of the
    step, per tensor (after Baydin et al. 2018, arXiv 1703.04782).

    State per coordinate: ``fast``, ``slow`` and ``square``, each ``(*S, 1)``; per tensor:
    ``stats``, ``(14,)``.
    """

    name = "horizon"
    Config = HorizonConfig
    test_configs: ClassVar[tuple[HorizonConfig, ...]] = (
        HorizonConfig(),
        HorizonConfig(hidden_size=5, warmup_steps=3, trust_start=-3.0, trust_gain=1.5),
        HorizonConfig(
            hidden_size=4, warmup_steps=2, trust_start=-2.0, trust_gain=1.5, trust_later_gain=0.3,
            trust_known_gain=0.2, trust_margin=0.1,
        ),
        HorizonConfig(
            hidden_size=4, warmup_steps=2, trust_start=-2.0, trust_gain=1.5, trust_known_gain=0.4,
            trust_margin=0.1, trust_growth=4.0, weight_decay=1.0, decay_power=3.0,
            decay_live=True, adapter_power=0.5,
        ),
    )  # fmt: skip
    rows = "tensors"
    coordinatewise = False
    zero_preserving = True
    reads_horizon = True
    network_state = tensor_state = ("stats",)
    matrix_state = basis.KEYS
    config: HorizonConfig

    def __init__(self, config: HorizonConfig | None = None) -> None:
        super().__init__(config)
        units = self.config.hidden_size
        inputs = history.INPUTS + self.config.trusts + self.config.eigenbasis
        self.hidden = nn.Linear(inputs, units)
        self.readout = nn.Linear(units, 1 + DIRECTIONS)
        self.direct = nn.Linear(inputs, 1 + DIRECTIONS, bias=False)
        nn.init.normal_(self.hidden.weight, std=inputs**-0.5)
        nn.init.zeros_(self.hidden.bias)
        # The untrained rule is the schedule on Adam's direction.
        for weight in (*self.readout.parameters(), *self.direct.parameters()):
            nn.init.zeros_(weight)

    def init_state(self, param: Tensor) -> State:
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        moments = {key: like.unsqueeze(-1).clone() for key in ("fast", "slow", "square")}
        stats = torch.zeros(history.STATS, dtype=self.dtype, device=param.device)
        stats[history.TRUST] = self.config.trust_start
        bases = {}
        if self.config.eigenbasis:
            sides = basis.rotated_sides(param.shape)
            bases = basis.init_bases(param.shape, sides, self.dtype, param.device)
        return {**moments, "stats": stats, **bases}

    @property
    def longest_step(self) -> float:
        """Bound of a coordinate's step at lr = 1, in units of the tensor's scale.

        Momenta are at most ``sum_k w_k / sqrt(v_k)`` in units of r (Cauchy and Schwarz): 2.4 for
        the fast one, 1 for the slow one.
        """
        cfg = self.config
        fast = largest_momentum(cfg.fast_beta, cfg.square_beta)
        slow = largest_momentum(cfg.slow_beta, cfg.square_beta)
        mixed = (1 + 2 * _MIX_BOUND) * fast + _MIX_BOUND * (slow + _LARGEST_RATIO)
        return cfg.base_step * math.exp(_STEP_BOUND) * mixed

    # ---- the parts of a step

    def moments(self, grad: Tensor, state: State) -> State:
        cfg = self.config
        fast, slow, square = (state[key].squeeze(-1) for key in ("fast", "slow", "square"))
        return {
            "fast": torch.lerp(grad, fast, cfg.fast_beta).unsqueeze(-1),
            "slow": torch.lerp(grad, slow, cfg.slow_beta).unsqueeze(-1),
            "square": torch.lerp(grad.square(), square, cfg.square_beta).unsqueeze(-1),
        }

    def products(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> Sequence[Product]:
        cfg = self.config
        fast, slow, square = self._corrected(
            grad, state, segments.expand(self._corrections(context))
        )
        r = (square + TINY**2).sqrt()
        s_fast, s_slow = fast / r, slow / r
        ratio = (grad / r).clamp(-_LARGEST_RATIO, _LARGEST_RATIO)
        # The momenta before this gradient, in the same units.
        before = segments.expand(self._before(context))
        old_fast = momentum_before(state["fast"], grad, cfg.fast_beta) / r * before[0]
        old_slow = momentum_before(state["slow"], grad, cfg.slow_beta) / r * before[1]
        return (
            (param, param), (square, None), (fast, fast), (slow, slow), (s_fast, s_fast),
            (s_slow, s_slow), (r, None), (ratio, old_fast), (ratio, old_slow), (ratio, ratio),
            (old_fast, old_fast), (old_slow, old_slow), ((grad != 0).to(grad.dtype), None),
        )  # fmt: skip

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Time, shape and measurements of each tensor, ``(m, f)``; bias corrections."""
        features = (*self._time(segments, context), *history.measurements(means))
        return torch.stack(features, dim=-1), self._corrections(context)

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        assert stats is not None
        fast, slow, square = self._corrected(grad, state, stats)
        r = (square + TINY**2).sqrt()
        s_fast = fast / r
        ratio = (grad / r).clamp(-_LARGEST_RATIO, _LARGEST_RATIO)
        cautious = torch.where(s_fast * grad > 0, s_fast, torch.zeros_like(s_fast))
        return None, torch.stack((s_fast, slow / r, ratio, cautious)).t()

    def inputs(self, seen: Tensor, stats: Tensor) -> Tensor:
        """What the network reads, ``(m, i)``, of a step ``(m, f)`` and the steps before it."""
        return history.network_inputs(seen, stats, self.config.trusts, self.config.eigenbasis)

    def answers(self, inputs: Tensor) -> Tensor:
        """Log of the factor on the step, and the shares, before they are bounded: ``(m, 5)``."""
        answer: Tensor = self.readout(torch.tanh(self.hidden(inputs))) + self.direct(inputs)
        return answer

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        stats, gains = state["stats"], []
        for now in features.unbind():  # (m, f)
            out = self.answers(self.inputs(now, stats))
            factor = _STEP_BOUND * torch.tanh(out[:, :1] / _STEP_BOUND)
            step = (factor + stats[:, history.TRUST].unsqueeze(-1)).exp()
            mix = _MIX_BOUND * torch.tanh(out[:, 1:] / _MIX_BOUND)
            mix = mix + torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=mix.dtype, device=mix.device)
            gains.append(-self._rate(now, stats) * step * mix)
            stats = history.next_stats(now, stats, self._trust)
        return torch.stack(gains), {"stats": stats}

    def default_weight_decay(self, total_steps: float | None) -> float:
        """Of runs of known length: an unknown one may be long enough to shrink everything."""
        if total_steps is None:
            return 0.0
        return self.config.weight_decay * min(1.0, _UNDIMINISHED_STEPS / total_steps)

    def scheduled_decay(
        self, weight_decay: float, states: Sequence[State], context: StepContext
    ) -> Tensor:
        """Times trust and a power of the schedule, ``(m,)``: weights that step shrink."""
        trust = torch.stack([state["stats"][history.TRUST] for state in states])
        schedule = self._schedule(context) ** self.config.decay_power
        return weight_decay * schedule * trust.to(context.step.dtype).exp()

    @property
    def decays_live(self) -> bool:
        """See :attr:`UpdateRule.decays_live`."""
        return self.config.decay_live

    # ---- what is computed of whole tensors

    @property
    def _trust(self) -> history.Trust:
        cfg = self.config
        return history.Trust(
            cfg.trust_start, cfg.trust_gain, cfg.trust_later_gain, cfg.trust_known_gain,
            cfg.trust_margin, cfg.trust_growth, cfg.warmup_steps,
        )  # fmt: skip

    def _corrections(self, context: StepContext) -> Tensor:
        """Bias corrections of the three moments after this step, ``(3, m)``."""
        cfg = self.config
        return bias_correction(context.step + 1, cfg.fast_beta, cfg.slow_beta, cfg.square_beta)

    def _before(self, context: StepContext) -> Tensor:
        """Factors on ``new momentum - (1 - beta) grad`` for that before, unbiased, ``(2, m)``."""
        cfg = self.config
        betas = (cfg.fast_beta, cfg.slow_beta)
        correction = bias_correction(context.step.clamp(min=1), *betas)
        decay = correction.new_tensor(betas).unsqueeze(1)
        return torch.where(context.step > 0, 1 / (decay * correction), 0.0)

    def _corrected(
        self, grad: Tensor, state: State, corrections: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unbiased moments, each ``(n,)``, from corrections ``(3, n)``."""
        moments = (state[key].squeeze(-1) for key in ("fast", "slow", "square"))
        fast, slow, square = (m / c for m, c in zip(moments, corrections, strict=True))
        return fast, slow, square

    def _time(self, segments: Segments, context: StepContext) -> list[Tensor]:
        """Age, schedule, scale and tallness, which :meth:`_rate` reads; then features, ``(m,)``."""
        step = context.step
        one = torch.ones_like(step)
        known, total = torch.zeros_like(step), one
        if context.total_steps is not None:
            known, total = one, context.total_steps * one
        progress = known * (step / total).clamp(max=1.0)
        return [
            step,
            self._schedule(context),
            segments.init_scale.clamp(max=self.config.largest_scale),
            segments.log_tallness,
            segments.log_fan_in / 4 - 1,
            segments.log_size / 6 - 1,
            segments.is_vector,
            (step.clamp(max=_LARGEST_COUNT) + 1).log() / 4 - 1,
            (-step / 10).exp(),
            known,
            progress,
            known * (1.02 - progress).log() / 2,
            known * (total.clamp(max=_LARGEST_COUNT).log() / 4 - 1.5),
            torch.zeros_like(step) if context.rotated is None else context.rotated,
        ]

    def _schedule(self, context: StepContext) -> Tensor:
        cfg = self.config
        return rate_schedule(context.step, context.total_steps, cfg.warmup_share, cfg.warmup_steps)

    def _rate(self, now: Tensor, stats: Tensor) -> Tensor:
        """Base step times schedule times scale, ``(m, 1)``."""
        rms = history.scale_of(now, stats).clamp(max=self.config.largest_scale)
        scale = torch.maximum(rms, self.config.smallest_share * now[:, history.NATURAL])
        if self.config.adapter_power > 0:
            zero = history.scale_of(now, stats, history.FIRST_RMS) == 0
            tall = history.live_share(now, stats) * now[:, history.TALLNESS]
            shorter = (-self.config.adapter_power * tall).exp()
            scale = scale * torch.where(zero, shorter, 1.0)
        return (self.config.base_step * now[:, history.SCHEDULE] * scale).unsqueeze(-1)
