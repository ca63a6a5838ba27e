"""One small LSTM per tensor that steers normalized momenta: the cheap general-purpose rule.

What costs in a coordinatewise network is the network, at every coordinate. Here it runs once per
tensor, reads a dozen of the tensor's statistics, and answers with the gains of six cheap signals
that every coordinate forms from its gradient history: momenta on two time scales and the gradient,
normalized by the coordinate's own root mean square as in Adam (Kingma and Ba 2015), or by the
whole tensor's as in normalized SGD. Learned optimizers with a recurrent network per tensor go back
to Wichrowska et al. 2017 and VeLO (Metz et al. 2022).

Symmetries and units are those of :mod:`learned_optim.rules.equivariant`: zero history gives zero
update, the update is odd in the history, a constant factor on the loss changes nothing, and steps
are in units of the tensor's scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.rules._base import State, StepContext, UpdateRule
from learned_optim.rules._config import RuleConfig
from learned_optim.rules._features import TINY, bias_correction, inverse_root, log_ratio
from learned_optim.rules._lstm import LSTMStack, widen
from learned_optim.rules._segments import Product, Segments

_FEATURES, _DIRECTIONS = 14, 6
_MOMENTS = ("fast", "slow", "square")
# The third is 1/12 in float32, which shipped weights were trained with.
_FEATURE_UNITS = [1 / 4, 1 / 8, 0.0833333358168602, 1, 1 / 4, 1, *[1 / 4] * 6, 1, 1]


@dataclass(frozen=True)
class SteeredConfig(RuleConfig):
    """Architecture of :class:`SteeredRule`."""

    hidden_size: int = 16
    """Units per LSTM layer; one network per tensor, so they cost next to nothing."""
    num_layers: int = 1
    """Stacked LSTM layers."""
    fast_beta: float = 0.9
    """Decay of the fast momentum."""
    slow_beta: float = 0.99
    """Decay of the slow momentum."""
    square_beta: float = 0.99
    """Decay of the mean square that normalizes."""
    initial_step: float = 0.02
    """Step of the untrained rule, in units of the tensor's scale."""
    direct: bool = False
    """Whether the features also reach the gains directly, past the LSTM."""


class SteeredRule(UpdateRule):
    """Per-tensor LSTM gains on per-coordinate momenta, relative to the tensor's scale.

    With ``f``, ``s`` the bias-corrected momenta, ``g`` the gradient, ``r`` the coordinate's root
    mean square and ``R`` the tensor's,

        update = -scale * exp(a) * (f/r + b_1 f/r + b_2 s/r + b_3 g/r
                                    + b_4 f/R + b_5 s/R + b_6 f/r |s/r|)

    where ``a`` and ``b`` are read out from the tensor's LSTM and, if ``direct``, from its features,
    as in :class:`~learned_optim.rules.equivariant.EquivariantRule`. State per coordinate: ``fast``,
    ``slow`` and ``square``, each ``(*S, 1)``; per tensor: the LSTM's.
    """

    name = "steered"
    Config = SteeredConfig
    test_configs = (SteeredConfig(direct=True), SteeredConfig(hidden_size=5))
    rows = "tensors"
    coordinatewise = False
    zero_preserving = True
    warmup_steps = 50  # the first updates of shipped weights are as large as trained weights
    network_state = tensor_state = LSTMStack.STATE
    config: SteeredConfig

    def __init__(self, config: SteeredConfig | None = None) -> None:
        super().__init__(config)
        self.lstm = LSTMStack(_FEATURES, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1 + _DIRECTIONS)
        # The untrained rule is a small step along the fast momentum, in the right direction.
        nn.init.normal_(self.readout.weight, std=0.02)
        nn.init.zeros_(self.readout.bias)
        self.direct: nn.Linear | None = None
        if self.config.direct:
            self.direct = nn.Linear(_FEATURES, 1 + _DIRECTIONS, bias=False)
            nn.init.zeros_(self.direct.weight)

    def _widen(self, name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
        return widen(name, own, narrow)

    def init_state(self, param: Tensor) -> State:
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        moments = {key: like.unsqueeze(-1).clone() for key in _MOMENTS}
        zero = torch.zeros((), dtype=self.dtype, device=param.device)
        return {**moments, **self.lstm.zero_state(zero, self.dtype)}

    def moments(self, grad: Tensor, state: State) -> State:
        cfg = self.config
        fast, slow, square = (state[key].squeeze(-1) for key in _MOMENTS)
        new = (
            torch.lerp(grad, fast, cfg.fast_beta),
            torch.lerp(grad, slow, cfg.slow_beta),
            torch.lerp(grad.square(), square, cfg.square_beta),
        )
        return {key: value.unsqueeze(-1) for key, value in zip(_MOMENTS, new, strict=True)}

    def products(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> Sequence[Product]:
        fast, slow, square = (state[key].squeeze(-1) for key in _MOMENTS)
        r = inverse_root(square)
        s_fast, s_slow = fast * r, slow * r
        return (
            (fast, fast), (slow, slow), (grad, grad), (square, None), (square, r), (param, param),
            (s_fast, s_fast), (s_slow, s_slow), (grad, fast), (grad, slow),
        )  # fmt: skip

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """14 features of each tensor; factors that turn products of moments into directions."""
        cfg, count = self.config, context.step + 1
        fast, slow, square = bias_correction(count, cfg.fast_beta, cfg.slow_beta, cfg.square_beta)
        root, one = square.sqrt(), torch.ones_like(square)
        corrections = (
            fast.square(), slow.square(), one, square, root, one,
            fast.square() / square, slow.square() / square, fast, slow,
        )  # fmt: skip
        means = means / torch.stack(corrections)
        moments, (mean_square, mean_root, param), signals, products = means.split((3, 3, 2, 2))
        mean_square = mean_square + TINY**2
        rms = (param + TINY).sqrt()  # differentiable at zero, too
        # How much of the tensor's gradient is signal; how unequal its coordinates are.
        squares = torch.cat((moments, mean_root.square().unsqueeze(0)))
        logs = log_ratio(squares, mean_square)  # (4, m)
        norms = (moments + TINY**2).sqrt()  # of the momenta and the gradient
        features = (
            # How small the tensor is against its initial scale, its shape, and its age.
            (rms / segments.init_scale).clamp(min=math.exp(-8.0)).log(),
            segments.log_fan_in,
            segments.log_size,
            segments.is_vector,
            count.clamp(max=10_000.0).log() - 4.0,
            (count * -0.1).exp(),
            *logs[:3],
            *(signals + 1e-4).log(),  # how much is signal, by coordinate
            logs[3],
            *(products / (norms[:2] * norms[2])),  # whether it still goes where it went
        )
        units = mean_square.new_tensor(_FEATURE_UNITS)
        scale = torch.maximum(rms, segments.init_scale)
        norm = mean_square.sqrt()
        stats = (
            scale * root / fast, scale * root / slow, scale * root, scale / (norm * fast),
            scale / (norm * slow), scale * square / (fast * slow),
        )  # fmt: skip
        return torch.stack(features, -1) * units, torch.stack(stats)

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        """Six directions in units of the tensor's scale, ``(n, 6)``."""
        assert stats is not None
        fast, slow, square = (state[key].squeeze(-1) for key in _MOMENTS)
        r = inverse_root(square)
        s_fast = fast * r
        s_slow = slow * r
        signals = (s_fast, s_slow, grad * r, fast, slow, s_fast * s_slow.abs())
        return None, torch.stack([s * by for s, by in zip(signals, stats, strict=True)]).t()

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        out, new_state = self.lstm.sequence(features, state)
        return self._gains(out, features), new_state

    def respond_(self, features: Tensor, state: State) -> Tensor:
        return self._gains(self.lstm.step_(features, state), features)

    def _gains(self, out: Tensor, features: Tensor) -> Tensor:
        """Gains of the directions, ``(*, 6)``.

        Args:
            out: hidden states, ``(*, hidden_size)``; ``features`` ``(*, 14)``.
        """
        read = self.readout(out)
        if self.direct is not None:
            read = read + self.direct(features)
        # The exponent is bounded: steps of e^-5 to e^5 times the initial one.
        step = self.config.initial_step * (5.0 * torch.tanh(read[..., :1] / 2.5)).exp()
        mix = torch.cat((read[..., 1:2] + 1.0, read[..., 2:]), dim=-1)
        return -step * mix
