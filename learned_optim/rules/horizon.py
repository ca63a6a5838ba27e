"""The default: Adam-like steps, steered by a small network per tensor.

One step of a tensor with gradient ``G`` and parameter ``W``:

    g = Q_L^T G Q_R                                           matrices: into the eigenbasis
    f, s, v = running means of g, g, g^2                      decays .9, .99, .99
    r = sqrt(v)                                               all bias-corrected
    a, b = network(shape, age, progress, statistics)          one evaluation per tensor
    step = base * schedule * scale(W) * exp(a) * confidence   in units of the tensor, not too long
    u = -step * (f/r + b_1 f/r + b_2 s/r + b_3 g/r + b_4 [f g > 0] f/r)
    W <- W + Q_L u Q_R^T                                      and back

- *Basis* (SOAP, Vyas et al. 2024, arXiv 2409.11321): :mod:`learned_optim.rules._basis`.
- *Schedule*: a linear warm-up and, where the length of the run is known, a cosine to its end.
- *Scale*: root mean square of the parameters, bounded by what their shape suggests; a fifth of it
  for a tensor of one coordinate.
- *Longest step*: a tenth of the root mean square of the parameters, by the statistics of the step
  before. Many layers that move together by more are a different network.
- *Step confidence*: grows from ``e^-3`` to 1 while gradients agree with the momentum, and falls
  where steps are too long. A bounded hypergradient descent on the log of the step, per tensor
  (after Baydin et al. 2018, arXiv 1703.04782): fresh networks earn full steps at once, trained
  weights are not destroyed by the first long ones.
- *Network*: a few hundred weights, meta-trained by evolution strategies on whole runs. It reads the
  statistics of the step before, so that one pass over the coordinates does everything. Learned
  optimizers that know how far the run is go back to VeLO (Metz et al. 2022, arXiv 2211.09760).

Zero history gives zero update, the update is odd in the history, and a constant factor on the loss
changes nothing. No coordinate of ``u`` is larger than :attr:`HorizonRule.longest_step` times the
scale; the rotation preserves the norm of ``u``.

Constants and their reasons: :mod:`learned_optim.kernels.constants`. The compiled forms of this
step, ``kernels/step.cpp`` and ``kernels/_triton.py``, are held to it by tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from learned_optim.kernels import constants as c
from learned_optim.rules import _basis as basis
from learned_optim.rules import _history as history
from learned_optim.rules._base import RuleConfig, State, StepContext
from learned_optim.rules._features import bias_correction, momentum_before, zeros_by_column
from learned_optim.rules._kernel_rule import KernelRule
from learned_optim.rules._segments import Product, Segments

__all__ = ["HorizonConfig", "HorizonRule"]

# Fast momentum, slow momentum, gradient, and the cautious fast momentum (Liang et al. 2024, arXiv
# 2411.16085), each in units of `r`.
_DIRECTIONS = 4
_MOMENTS = ("fast", "slow", "square")
_BETAS = (c.FAST_BETA, c.SLOW_BETA, c.SQUARE_BETA)


@dataclass(frozen=True)
class HorizonConfig(RuleConfig):
    """Architecture of :class:`HorizonRule`."""

    hidden_size: int = 16
    """Units of the network."""
    eigenbasis: bool = False
    """Whether matrices are stepped in the eigenbasis of their gradients' covariances."""

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")


class HorizonRule(KernelRule):
    """Adam-like steps whose size and direction a small network per tensor sets.

    State per coordinate: ``fast``, ``slow`` and ``square``, each ``(*S, 1)``; per tensor:
    ``stats``, ``(14,)``; of a rotated matrix also :data:`learned_optim.rules._basis.KEYS`.
    """

    name = "horizon"
    Config = HorizonConfig
    test_configs: ClassVar[tuple[HorizonConfig, ...]] = (
        HorizonConfig(),
        HorizonConfig(hidden_size=5, eigenbasis=True),
    )
    rows = "tensors"
    coordinatewise = False
    zero_preserving = True
    reads_horizon = True
    decays_live = True
    network_state = tensor_state = ("stats",)
    matrix_state = basis.KEYS
    config: HorizonConfig

    def __init__(self, config: HorizonConfig | None = None) -> None:
        super().__init__(config)
        units = self.config.hidden_size
        self.hidden = nn.Linear(c.NUM_INPUTS, units)
        self.readout = nn.Linear(units, 1 + _DIRECTIONS)
        self.direct = nn.Linear(c.NUM_INPUTS, 1 + _DIRECTIONS, bias=False)
        nn.init.normal_(self.hidden.weight, std=c.NUM_INPUTS**-0.5)
        nn.init.zeros_(self.hidden.bias)
        # The untrained rule is the schedule on Adam's direction.
        for weight in (*self.readout.parameters(), *self.direct.parameters()):
            nn.init.zeros_(weight)

    def init_state(self, param: Tensor) -> State:
        moments = {key: zeros_by_column(param, 1, self.dtype) for key in _MOMENTS}
        stats = torch.zeros(c.NUM_STATS, dtype=self.dtype, device=param.device)
        stats[history.CONFIDENCE] = c.CONFIDENCE_START
        return {**moments, "stats": stats}

    def init_matrices(self, shape: torch.Size, device: torch.device) -> State:
        if not self.config.eigenbasis:
            return {}
        return basis.init_bases(shape, basis.rotated_sides(shape), self.dtype, device)

    @property
    def longest_step(self) -> float:
        """Bound of a coordinate's step at lr = 1, in units of the tensor's scale.

        Momenta are at most ``sum_k w_k / sqrt(v_k)`` in units of r (Cauchy and Schwarz): 2.4 for
        the fast one, 1 for the slow one.
        """
        fast, slow = self.momentum_bounds
        mixed = (1 + 2 * c.MIX_BOUND) * fast + c.MIX_BOUND * (slow + c.LARGEST_RATIO)
        return c.BASE_STEP * math.exp(c.STEP_BOUND) * mixed

    # ---- coordinates: moments, and the directions of the update

    def moments(self, grad: Tensor, state: State) -> State:
        values = (grad, grad, grad.square())
        return {
            key: torch.lerp(value, state[key].squeeze(-1), beta).unsqueeze(-1)
            for key, value, beta in zip(_MOMENTS, values, _BETAS, strict=True)
        }

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        """The four directions, ``(n, 4)``; ``stats`` are bias corrections, ``(3, n)``."""
        assert stats is not None
        fast, slow, square = _corrected(state, stats)
        r = (square + c.TINY**2).sqrt()
        fast_ratio = fast / r
        ratio = (grad / r).clamp(-c.LARGEST_RATIO, c.LARGEST_RATIO)
        cautious = torch.where(fast_ratio * grad > 0, fast_ratio, 0.0)
        return None, torch.stack((fast_ratio, slow / r, ratio, cautious)).t()

    # ---- tensors: measurements, the network, and statistics

    def products(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> Sequence[Product]:
        """The products of which :func:`history.measurements` takes the means."""
        fast, slow, square = _corrected(state, segments.expand(_corrections(context)))
        r = (square + c.TINY**2).sqrt()
        fast_ratio, slow_ratio = fast / r, slow / r
        ratio = (grad / r).clamp(-c.LARGEST_RATIO, c.LARGEST_RATIO)
        # The momenta before this gradient, in the same units.
        before = segments.expand(_corrections_before(context))
        old_fast = momentum_before(state["fast"], grad, c.FAST_BETA) / r * before[0]
        old_slow = momentum_before(state["slow"], grad, c.SLOW_BETA) / r * before[1]
        return (
            (param, param), (square, None), (fast, fast), (slow, slow), (fast_ratio, fast_ratio),
            (slow_ratio, slow_ratio), (r, None), (ratio, old_fast), (ratio, old_slow),
            (ratio, ratio), (old_fast, old_fast), (old_slow, old_slow),
            ((grad != 0).to(grad.dtype), None),
        )  # fmt: skip

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Time, shape and measurements of each tensor, ``(m, f)``; bias corrections, ``(3, m)``."""
        step = context.step
        one = torch.ones_like(step)
        known, total = torch.zeros_like(step), one
        if context.total_steps is not None:
            known, total = one, context.total_steps * one
        progress = known * (step / total).clamp(max=1.0)
        features = (
            step,
            rate_schedule(step, context.total_steps),
            segments.init_scale.clamp(max=c.LARGEST_SCALE),
            segments.log_fan_in / 4 - 1,
            segments.log_size / 6 - 1,
            segments.is_vector,
            (step.clamp(max=c.LARGEST_COUNT) + 1).log() / 4 - 1,
            (-step / 10).exp(),
            known,
            progress,
            known * (1.02 - progress).log() / 2,
            known * (total.clamp(max=c.LARGEST_COUNT).log() / 4 - 1.5),
            torch.zeros_like(step) if context.rotated is None else context.rotated,
            *history.measurements(means),
        )
        return torch.stack(features, dim=-1), _corrections(context)

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        stats, gains = state["stats"], []
        for now in features.unbind():  # (m, f)
            inputs = history.network_inputs(now, stats)
            # Log of the factor on the step, and the directions' shares, not yet bounded: (m, 5).
            out = self.readout(torch.tanh(self.hidden(inputs))) + self.direct(inputs)
            factor = c.STEP_BOUND * torch.tanh(out[:, :1] / c.STEP_BOUND)
            confidence = stats[:, history.CONFIDENCE].unsqueeze(-1)
            mix = c.MIX_BOUND * torch.tanh(out[:, 1:] / c.MIX_BOUND)
            mix = mix + mix.new_tensor([1.0, 0.0, 0.0, 0.0])
            rms, least = history.scale_of(now, stats), c.SMALLEST_SHARE * now[:, history.NATURAL]
            scale = torch.maximum(rms.clamp(max=c.LARGEST_SCALE), least)
            rate = (c.BASE_STEP * now[:, history.SCHEDULE] * scale).unsqueeze(-1)
            longest = c.LONGEST_STEP * torch.maximum(rms, least).unsqueeze(-1)
            step = torch.minimum(rate * (factor + confidence).exp(), longest / _length(mix, stats))
            single = now[:, history.SIZE, None] <= -1
            gains.append(-torch.where(single, c.SINGLE_SHARE * step, step) * mix)
            stats = history.next_stats(now, stats)
        return torch.stack(gains), {"stats": stats}

    # ---- weight decay

    def default_weight_decay(self, total_steps: float | None) -> float:
        """1 in runs of known length, less in long ones; 0 where the length is unknown.

        A run of unknown length may be long enough for any decay to shrink all parameters.
        """
        if total_steps is None:
            return 0.0
        return c.WEIGHT_DECAY * min(1.0, c.UNDIMINISHED_STEPS / total_steps)

    def scheduled_decay(
        self, weight_decay: float, states: Sequence[State], context: StepContext
    ) -> Tensor:
        """Weight decay times step confidence and a power of the schedule, ``(m,)``."""
        confidence = torch.stack([state["stats"][history.CONFIDENCE] for state in states])
        schedule = rate_schedule(context.step, context.total_steps) ** c.DECAY_POWER
        return weight_decay * schedule * confidence.to(context.step.dtype).exp()


def _length(mix: Tensor, stats: Tensor) -> Tensor:
    """Root mean square of a step's sum of directions, at most, ``(m, 1)``.

    That of the momenta in units of r is known from the step before, in ``stats``, ``(m, 14)``; that
    of the gradient is 1. ``mix`` are shares of the directions, ``(m, 4)``.
    """
    fast, slow, grad, cautious = mix.unsqueeze(-1).unbind(1)
    signals = (0.5 * stats[:, [history.FAST_SIGNAL, history.SLOW_SIGNAL]]).exp()
    fast_rms, slow_rms = signals.unsqueeze(-1).unbind(1)
    return (fast + cautious).abs() * fast_rms + slow.abs() * slow_rms + grad.abs()


def rate_schedule(step: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """Linear warm-up to 1; where the length of the run is known, a cosine to its end as well.

    ``step`` is the number of earlier updates of each tensor, ``(m,)``; the result has its shape.
    ``total_steps`` is ``()`` or ``(m,)``.
    """
    if total_steps is None:
        return ((step + 1) / c.WARMUP_STEPS).clamp(max=1.0)
    total = total_steps * torch.ones_like(step)
    warmup = (c.WARMUP_SHARE * total).clamp(c.SHORTEST_WARMUP, c.LONGEST_WARMUP)
    angle = math.pi * ((step + 1) / (total + 1)).clamp(max=1.0)
    fall = (0.5 * (1.0 + angle.cos())).clamp(min=c.LAST_RATE)
    return ((step + 1) / warmup).clamp(max=1.0) * fall


def _corrections(context: StepContext) -> Tensor:
    """Bias corrections of the three moments after this step, ``(3, m)``."""
    return bias_correction(context.step + 1, *_BETAS)


def _corrections_before(context: StepContext) -> Tensor:
    """Factors from ``new momentum - (1 - beta) grad`` to the unbiased momentum before, ``(2, m)``.

    0 at the first step.
    """
    correction = bias_correction(context.step.clamp(min=1), *_BETAS[:2])
    decay = correction.new_tensor(_BETAS[:2]).unsqueeze(1)
    return torch.where(context.step > 0, 1 / (decay * correction), 0.0)


def _corrected(state: State, corrections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased moments, each ``(n,)``, from corrections ``(3, n)``."""
    fast, slow, square = (
        state[key].squeeze(-1) / correction
        for key, correction in zip(_MOMENTS, corrections, strict=True)
    )
    return fast, slow, square
