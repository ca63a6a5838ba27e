"""A sign-equivariant LSTM that scales momentum: the general-purpose rule.

The network sees even functions of the gradient history only and decides *how far* to go; the
direction is a mixture of odd signals, the normalized momenta of Adam (Kingma and Ba 2015) and
RNNprop (Lv, Jiang and Li 2017) on two time scales. Hence, by construction,

- a zero gradient history gives an exactly zero update, where the plain LSTM drifts;
- ``update(-history) = -update(history)``;
- a constant factor on the loss changes nothing (beyond the epsilon of a division).

Steps are in units of the parameter tensor's own scale, ``max(rms(theta), 1 / sqrt(fan_in))``, and
the network sees where the tensor stands: its scale, shape and age, and how much of its gradient
is signal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.rules._base import RecurrentRule, RuleConfig, State
from learned_optim.rules._shards import whole_mean, whole_shape
from learned_optim.rules._stack import LSTMStack

# Keeps 0 / 0 at 0. Gradients below it count as zero; it is far below any a float32 network has.
TINY = 1e-15
# Scale of a vector (bias, norm gain) whose entries are smaller: fan-in says nothing about it.
VECTOR_SCALE = 0.1

_EVEN, _ODD = 15, 3  # features the network reads; directions it mixes


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


class EquivariantRule(RecurrentRule):
    """LSTM gains on normalized momenta, relative to the tensor's scale.

    ``update = -scale * exp(a) * (s_fast + b_1 s_fast + b_2 s_slow + b_3 s_now)`` with
    ``s = m_hat / sqrt(v_hat)`` and ``a``, ``b`` read out from the LSTM. State per coordinate:
    ``moments`` (fast, slow, square) and the LSTM's; per tensor: ``count``.
    """

    name = "equivariant"
    Config = EquivariantConfig
    coordinatewise = False
    zero_preserving = True
    network_state = LSTMStack.STATE
    config: EquivariantConfig

    def __init__(self, config: EquivariantConfig | None = None) -> None:
        super().__init__(config)
        self.lstm = LSTMStack(_EVEN, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1 + _ODD)
        # The untrained rule is a small step along the fast momentum, in the right direction.
        nn.init.normal_(self.readout.weight, std=0.02)
        nn.init.zeros_(self.readout.bias)

    def init_state(self, param: Tensor) -> State:
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        return {
            "moments": like.unsqueeze(-1).repeat(*(1,) * param.dim(), 3),
            "count": torch.zeros((), dtype=self.dtype, device=param.device),
            **self.lstm.zero_state(param, self.dtype),
        }

    def observe(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Signals ``(*param.shape, 19)``: 15 even features, 3 odd directions, the scale."""
        cfg = self.config
        count = state["count"].to(grad.dtype) + 1
        fast, slow, square = state["moments"].to(grad.dtype).unbind(-1)
        fast = torch.lerp(grad, fast, cfg.fast_beta)
        slow = torch.lerp(grad, slow, cfg.slow_beta)
        square = torch.lerp(grad.square(), square, cfg.square_beta)
        new_state = {"moments": torch.stack((fast, slow, square), -1), "count": count}

        unbias = [-torch.expm1(count * math.log(beta)) for beta in
                  (cfg.fast_beta, cfg.slow_beta, cfg.square_beta)]  # fmt: skip
        fast, slow, square = fast / unbias[0], slow / unbias[1], square / unbias[2]
        size = (square + TINY**2).sqrt()
        s_fast, s_slow = fast / size, slow / size
        s_now = (grad / size).clamp(-3.0, 3.0)

        mean_square, *means = whole_mean(square, fast.square(), slow.square(), grad.square())
        mean_square = mean_square + TINY**2
        scale, relative = tensor_scale(param)
        per_tensor = torch.stack(
            (
                relative,
                *_shape_features(param, count),
                (count.clamp(max=10_000.0).log() - 4.0) / 4.0,
                (-count / 10.0).exp(),
                *(_log_ratio(mean, mean_square) / 4.0 for mean in means),
            )
        )
        per_coordinate = (
            s_fast.abs() - 0.5,
            s_slow.abs() - 0.5,
            s_now.abs() - 0.5,
            s_fast * s_slow,
            s_now * s_fast,
            _log_ratio(square, mean_square) / 8.0,
            torch.tanh(param.abs() / scale) - 0.5,
        )
        signals = torch.cat(
            (
                torch.stack(per_coordinate, -1),
                per_tensor.expand(*param.shape, -1),
                torch.stack((s_fast, s_slow, s_now), -1),
                scale.expand(*param.shape, 1),
            ),
            dim=-1,
        )
        return signals, new_state

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        signals, observed = self.observe(grad, state, param, loss)
        out, network = self.lstm.step(signals[..., :_EVEN], state)
        return self._read_out(out, signals), {**observed, **network}

    def respond(self, signals: Tensor, state: State) -> tuple[Tensor, State]:
        out, network = self.lstm.sequence(signals[..., :_EVEN].contiguous(), state)
        return self._read_out(out, signals), network

    def respond_(self, signals: Tensor, state: State) -> Tensor:
        return self._read_out(self.lstm.step_(signals[:, :_EVEN], state), signals)

    def _read_out(self, out: Tensor, signals: Tensor) -> Tensor:
        """Updates ``(*S,)`` from hidden states ``(*S, hidden_size)`` and signals ``(*S, 19)``."""
        gains = self.readout(out)
        # The exponent is bounded: steps of e^-5 to e^5 times the initial one.
        log_step = 5.0 * torch.tanh(gains[..., 0] / 2.5)
        directions = signals[..., _EVEN : _EVEN + _ODD]
        mixed = (gains[..., 1:] * directions).sum(-1) + directions[..., 0]
        return -self.config.initial_step * signals[..., -1] * log_step.exp() * mixed


def tensor_scale(param: Tensor) -> tuple[Tensor, Tensor]:
    """The unit of a tensor's steps, and how small the tensor is against its natural scale.

    Returns:
        ``(scale, relative)``, both of shape ``()``: ``max(rms(theta), natural)`` with natural
        ``1 / sqrt(fan_in)`` (0.1 for vectors and scalars), and ``log(rms / natural) / 4``, not
        below -2.
    """
    natural = VECTOR_SCALE if param.dim() < 2 else _fan_in(param) ** -0.5
    rms = (whole_mean(param.square())[0] + TINY).sqrt()  # differentiable at zero, too
    relative = (rms / natural).clamp(min=math.exp(-8.0)).log() / 4.0
    return rms.clamp(min=natural), relative


def _fan_in(param: Tensor) -> int:
    """Inputs per output, as torch counts them for linear and convolutional weights."""
    return max(1, math.prod(whole_shape(param)[1:]))


def _shape_features(param: Tensor, like: Tensor) -> list[Tensor]:
    """Log fan-in and whether it is a vector, as tensors beside ``like``."""
    is_vector = param.dim() < 2
    fan_in = 1 if is_vector else _fan_in(param)
    return [torch.full_like(like, math.log(fan_in) / 8.0), torch.full_like(like, float(is_vector))]


def _log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), not below -16, so that zero has a value."""
    return (x / reference).clamp(min=math.exp(-16.0), max=math.exp(16.0)).log()
