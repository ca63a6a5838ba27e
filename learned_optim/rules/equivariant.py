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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
        return self._observe(grad, state["moments"], state["count"], param, _Alone(param))

    @torch.no_grad()
    def observe_many_(
        self, grads: Sequence[Tensor], states: Sequence[State], params: Sequence[Tensor]
    ) -> Tensor:
        """All tensors at once: the same signals as one by one, for a fraction of the calls."""
        packed = _Packed.of(tuple(p.shape for p in params), grads[0].dtype, grads[0].device)
        moments = torch.cat([state["moments"].view(-1, 3) for state in states])
        counts = torch.stack([state["count"] for state in states])
        grad = torch.cat([grad.reshape(-1) for grad in grads])
        param = torch.cat([param.reshape(-1) for param in params])
        signals, new = self._observe(grad, moments, counts, param, packed)
        torch._foreach_copy_([s["count"] for s in states], list(new["count"].unbind()))
        parts = new["moments"].split(packed.sizes)
        torch._foreach_copy_([s["moments"].view(-1, 3) for s in states], list(parts))
        return signals

    def _observe(
        self, grad: Tensor, moments: Tensor, count: Tensor, param: Tensor, at: _Alone | _Packed
    ) -> tuple[Tensor, State]:
        """:meth:`observe` of one tensor, or of several packed into one.

        Args:
            grad: ``S``, the tensor's shape, or ``(n,)`` packed; ``param`` likewise.
            moments: ``(*S, 3)`` or ``(n, 3)``.
            count: ``()`` or ``(tensors,)``.
            at: which coordinates belong to which tensor.
        """
        cfg = self.config
        count = count.to(grad.dtype) + 1
        fast, slow, square = moments.to(grad.dtype).unbind(-1)
        fast = torch.lerp(grad, fast, cfg.fast_beta)
        slow = torch.lerp(grad, slow, cfg.slow_beta)
        square = torch.lerp(grad.square(), square, cfg.square_beta)
        new_state = {"moments": torch.stack((fast, slow, square), -1), "count": count}

        betas = (cfg.fast_beta, cfg.slow_beta, cfg.square_beta)
        unbias = [at.spread(-torch.expm1(count * math.log(beta))) for beta in betas]
        fast, slow, square = fast / unbias[0], slow / unbias[1], square / unbias[2]
        size = (square + TINY**2).sqrt()
        s_fast, s_slow = fast / size, slow / size
        s_now = (grad / size).clamp(-3.0, 3.0)

        mean_square, param_square, *means = at.means(
            square, param.square(), fast.square(), slow.square(), grad.square()
        )
        mean_square = mean_square + TINY**2
        rms = (param_square + TINY).sqrt()  # differentiable at zero, too
        scale = at.spread(torch.maximum(rms, at.natural))
        per_tensor = torch.stack(
            (
                # How small the tensor is against its natural scale.
                (rms / at.natural).clamp(min=math.exp(-8.0)).log() / 4.0,
                at.log_fan_in / 8.0,
                at.is_vector,
                (count.clamp(max=10_000.0).log() - 4.0) / 4.0,
                (-count / 10.0).exp(),
                *(_log_ratio(mean, mean_square) / 4.0 for mean in means),
            ),
            dim=-1,
        )
        per_coordinate = (
            s_fast.abs() - 0.5,
            s_slow.abs() - 0.5,
            s_now.abs() - 0.5,
            s_fast * s_slow,
            s_now * s_fast,
            _log_ratio(square, at.spread(mean_square)) / 8.0,
            torch.tanh(param.abs() / scale) - 0.5,
        )
        signals = torch.cat(
            (
                torch.stack(per_coordinate, -1),
                at.rows(per_tensor),
                torch.stack((s_fast, s_slow, s_now), -1),
                scale.expand_as(grad).unsqueeze(-1),
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


def _natural_scale(shape: Sequence[int]) -> float:
    """What a tensor of this shape is drawn at: ``1 / sqrt(fan_in)``, 0.1 for vectors."""
    return VECTOR_SCALE if len(shape) < 2 else _fan_in(shape) ** -0.5


def _fan_in(shape: Sequence[int]) -> int:
    """Inputs per output, as torch counts them for linear and convolutional weights."""
    return max(1, math.prod(shape[1:]))


class _Alone:
    """One tensor, or a shard of one: per-tensor values have shape ``()``."""

    def __init__(self, param: Tensor) -> None:
        whole = whole_shape(param)
        self.shape = param.shape
        self.natural = param.new_tensor(_natural_scale(whole))
        self.log_fan_in = param.new_tensor(math.log(_fan_in(whole)))
        self.is_vector = param.new_tensor(float(len(whole) < 2))

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        return whole_mean(*values).unbind()

    def spread(self, value: Tensor) -> Tensor:
        return value

    def rows(self, features: Tensor) -> Tensor:
        return features.expand(*self.shape, -1)


class _Packed:
    """Several tensors flattened into one: per-tensor values have shape ``(tensors,)``."""

    def __init__(
        self, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.sizes = [shape.numel() for shape in shapes]
        self.counts = column([float(max(1, size)) for size in self.sizes])
        owner = torch.arange(len(shapes), device=device)
        self.owner = owner.repeat_interleave(torch.tensor(self.sizes, device=device))  # (n,)
        self.natural = column([_natural_scale(shape) for shape in shapes])
        self.log_fan_in = column([math.log(_fan_in(shape)) for shape in shapes])
        self.is_vector = column([float(len(shape) < 2) for shape in shapes])

    @staticmethod
    @lru_cache(maxsize=16)
    def of(shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device) -> _Packed:
        """The packing of these shapes, remembered: every step of an optimizee asks for it."""
        return _Packed(shapes, dtype, device)

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.stack(values)  # (m, n)
        totals = stacked.new_zeros(len(values), len(self.sizes))
        return (totals.index_add_(1, self.owner, stacked) / self.counts).unbind()

    def spread(self, value: Tensor) -> Tensor:
        return value[self.owner]

    def rows(self, features: Tensor) -> Tensor:
        return features[self.owner]


def _log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), not below -16, so that zero has a value."""
    return (x / reference).clamp(min=math.exp(-16.0), max=math.exp(16.0)).log()
