"""A sign-equivariant LSTM that scales momentum: the general-purpose rule.

The network reads only even functions of the gradient history and sets the step size. The
direction is a mixture of odd signals, the normalized momenta of Adam (Kingma and Ba 2015) and
RNNprop (Lv, Jiang and Li 2017) on two time scales. Hence, by construction,

- a zero gradient history gives an exactly zero update, where the plain LSTM drifts;
- ``update(-history) = -update(history)``;
- a constant factor on the loss changes nothing (beyond the epsilon of a division).

Steps are in units of the tensor's scale, ``max(rms(theta), 1 / sqrt(fan_in))``. The network also
reads the tensor's scale, shape and age, and the share of signal in its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.kernels.constants import TINY
from learned_optim.rules._base import RuleConfig, State, StepContext, UpdateRule
from learned_optim.rules._features import bias_correction, inverse_root, log_ratio, zeros_by_column
from learned_optim.rules._lstm import LSTMStack
from learned_optim.rules._segments import Product, Segments

_COORDINATE_FEATURES, _TENSOR_FEATURES, _DIRECTIONS = 7, 8, 3
_FEATURES = _COORDINATE_FEATURES + _TENSOR_FEATURES


@dataclass(frozen=True)
class EquivariantConfig(RuleConfig):
    """Architecture of :class:`EquivariantRule`."""

    hidden_size: int = 8
    """Units per LSTM layer."""
    num_layers: int = 1
    """Stacked LSTM layers."""
    fast_beta: float = 0.9
    """Decay of the fast momentum."""
    slow_beta: float = 0.99
    """Decay of the slow momentum."""
    square_beta: float = 0.999
    """Decay of the mean square that normalizes."""
    initial_step: float = 0.02
    """Step of the untrained rule, in units of the tensor's scale."""
    direct: bool = False
    """Whether the gains also read the features of whole tensors directly, past the LSTM."""


class EquivariantRule(UpdateRule):
    """LSTM gains on normalized momenta, relative to the tensor's scale.

    ``update = -scale * exp(a) * (s_fast + b_1 s_fast + b_2 s_slow + b_3 s_now)`` with
    ``s = m_hat / sqrt(v_hat)`` and ``a``, ``b`` read out from the LSTM. With ``direct`` they also
    read the features of the tensor: an LSTM with zero state takes several steps to report that
    weights are a hundred times below their scale, and the first steps matter most.
    State per coordinate: ``moments`` (fast, slow, square) and the LSTM's.
    """

    name = "equivariant"
    Config = EquivariantConfig
    test_configs = (EquivariantConfig(direct=True), EquivariantConfig(hidden_size=5, num_layers=2))
    rows = "coordinates"
    coordinatewise = False
    zero_preserving = True
    network_state = LSTMStack.STATE
    config: EquivariantConfig

    def __init__(self, config: EquivariantConfig | None = None) -> None:
        super().__init__(config)
        self.lstm = LSTMStack(_FEATURES, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1 + _DIRECTIONS)
        # The untrained rule is a small step along the fast momentum, in the right direction.
        nn.init.normal_(self.readout.weight, std=0.02)
        nn.init.zeros_(self.readout.bias)
        self.direct: nn.Linear | None = None
        if self.config.direct:
            self.direct = nn.Linear(_TENSOR_FEATURES, 1 + _DIRECTIONS, bias=False)
            nn.init.zeros_(self.direct.weight)

    def init_state(self, param: Tensor) -> State:
        return {
            "moments": zeros_by_column(param, 3, self.dtype),
            **self.lstm.zero_state(param, self.dtype),
        }

    def moments(self, grad: Tensor, state: State) -> State:
        """Fast and slow momentum and mean square, ``(n, 3)``."""
        cfg = self.config
        fast, slow, square = state["moments"].unbind(-1)
        new = (
            torch.lerp(grad, fast, cfg.fast_beta),
            torch.lerp(grad, slow, cfg.slow_beta),
            torch.lerp(grad.square(), square, cfg.square_beta),
        )
        return {"moments": torch.stack(new).t()}

    def products(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> Sequence[Product]:
        fast, slow, square = state["moments"].unbind(-1)
        return ((square, None), (param, param), (fast, fast), (slow, slow), (grad, grad))

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[None, Tensor]:
        """Bias corrections (3), scale, mean square, and the features of the tensor (8)."""
        cfg, count = self.config, context.step + 1
        correction = bias_correction(count, cfg.fast_beta, cfg.slow_beta, cfg.square_beta)
        square, param, fast, slow, grad = means
        mean_square = square / correction[2] + TINY**2
        rms = (param + TINY).sqrt()  # differentiable at zero, too
        squares = (fast / correction[0].square(), slow / correction[1].square(), grad)
        logs = log_ratio(torch.stack(squares), mean_square)
        stats = (
            *correction,
            torch.maximum(rms, segments.init_scale),
            mean_square,
            # How small the tensor is against its initial scale.
            (rms / segments.init_scale).clamp(min=math.exp(-8.0)).log() / 4.0,
            segments.log_fan_in / 8.0,
            segments.is_vector,
            (count.clamp(max=10_000.0).log() - 4.0) / 4.0,
            (-count / 10.0).exp(),
            *(logs / 4.0),
        )
        return None, torch.stack(stats)

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """7 even features of the coordinate and 8 of its tensor; 3 odd directions, scaled."""
        assert stats is not None
        scale, mean_square = stats[3], stats[4]
        fast, slow, square = (state["moments"].t() / stats[:3]).unbind()
        inverse_size = inverse_root(square)
        s_now = (grad * inverse_size).clamp(-3.0, 3.0)
        ratios = torch.stack((fast * inverse_size, slow * inverse_size, s_now))
        s_fast, s_slow, s_now = ratios.unbind()
        others = (
            s_fast * s_slow,
            s_now * s_fast,
            log_ratio(square, mean_square) / 8.0,
            # tanh(z) = 2 sigmoid(2z) - 1, several times cheaper in eager mode: as in the network.
            ((param / scale).abs() * 2.0).sigmoid() * 2.0 - 1.5,
        )
        # Joined from few parts, because every part costs a call.
        features = (ratios.abs() - 0.5, torch.stack(others), stats[-_TENSOR_FEATURES:])
        return torch.cat(features).t(), (ratios * scale).t()

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        out, new_state = self.lstm.sequence(features.contiguous(), state)
        return self._gains(out, features), new_state

    def respond_(self, features: Tensor, state: State) -> Tensor:
        return self._gains(self.lstm.step_(features, state), features)

    def _gains(self, out: Tensor, features: Tensor) -> Tensor:
        """Gains of the directions, ``(*, n, 3)``, from hidden states ``(*, n, hidden_size)``."""
        # Transposed, so that each output is contiguous in memory.
        read = self.readout.weight @ out.mT + self.readout.bias.unsqueeze(1)
        if self.direct is not None:
            read = read + self.direct.weight @ features[..., -_TENSOR_FEATURES:].mT
        log_step, mix = read.split((1, _DIRECTIONS), dim=-2)
        # The exponent is bounded: steps of e^-5 to e^5 times the initial one.
        step = (10.0 * (0.8 * log_step).sigmoid() - 5.0).exp() * -self.config.initial_step
        nominal = mix.new_tensor([[1.0], [0.0], [0.0]])
        return ((mix + nominal) * step).mT
