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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.rules._base import (
    RuleConfig,
    State,
    TensorRule,
    as_it_is,
    blocks,
    flat,
    pack_rows,
    split_like,
)
from learned_optim.rules._shards import mean_from_sums, whole_shape
from learned_optim.rules._stack import LSTMStack, widened
from learned_optim.rules._tensors import TINY, Alone, Packed, log_ratio, unbias

_FEATURES, _DIRECTIONS = 14, 6
_MOMENTS, _MEANS = ("fast", "slow", "square"), 10
_FEATURE_UNITS = [1 / 4, 1 / 8, 1 / 12, 1, 1 / 4, 1, *[1 / 4] * 6, 1, 1]
# Coordinates per block of the in-place path, which are as cheap as calls are dear.
_BLOCK = 1 << 16


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


class SteeredRule(TensorRule):
    """Per-tensor LSTM gains on per-coordinate momenta, relative to the tensor's scale.

    With ``f``, ``s`` the bias-corrected momenta, ``g`` the gradient, ``r`` the coordinate's root
    mean square and ``R`` the tensor's,

        update = -scale * exp(a) * (f/r + b_1 f/r + b_2 s/r + b_3 g/r
                                    + b_4 f/R + b_5 s/R + b_6 f/r |s/r|)

    where ``a`` and ``b`` are read out from the tensor's LSTM and, if ``direct``, from its features,
    as in :class:`~learned_optim.rules.equivariant.EquivariantRule`. State per coordinate: ``fast``,
    ``slow`` and ``square``, each ``(*S, 1)``; per tensor: ``count`` and the LSTM's.
    """

    name = "steered"
    Config = SteeredConfig
    coordinatewise = False
    pack_below = 1 << 15
    zero_preserving = True
    network_state = LSTMStack.STATE
    config: SteeredConfig

    def __init__(self, config: SteeredConfig | None = None) -> None:
        super().__init__(config)
        self.lstm = LSTMStack(_FEATURES, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1 + _DIRECTIONS)
        # The untrained rule is a small step along the fast momentum, in the right direction.
        nn.init.normal_(self.readout.weight, std=0.02)
        nn.init.zeros_(self.readout.bias)
        self.units: Tensor
        self.register_buffer("units", torch.tensor(_FEATURE_UNITS), persistent=False)
        self.direct: nn.Linear | None = None
        if self.config.direct:
            self.direct = nn.Linear(_FEATURES, 1 + _DIRECTIONS, bias=False)
            nn.init.zeros_(self.direct.weight)

    def _widened(self, name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
        return widened(name, own, narrow)

    def init_state(self, param: Tensor) -> State:
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        zero = torch.zeros((), dtype=self.dtype, device=param.device)
        return {
            "fast": like.unsqueeze(-1),
            "slow": like.unsqueeze(-1).clone(),
            "square": like.unsqueeze(-1).clone(),
            "count": zero,
            **self.lstm.zero_state(zero, self.dtype),
        }

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        moments = tuple(state[key].squeeze(-1) for key in _MOMENTS)
        features, scale, directions, new, count = self._observe(
            grad, moments, state["count"], param, Alone(param)
        )
        out, network = self.lstm.step(features, state)
        update = (directions * (self._gains(out, features) * scale.unsqueeze(-1))).sum(-1)
        fast, slow, square = (value.unsqueeze(-1) for value in new)
        return update, {"fast": fast, "slow": slow, "square": square, "count": count, **network}

    def gains(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        out, network = self.lstm.sequence(features, state)
        return self._gains(out, features), network

    def _gains(self, out: Tensor, features: Tensor) -> Tensor:
        """``(*, 6)`` gains of the directions, in units of the scale.

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

    @torch.no_grad()
    def observe_many_(
        self, grads: Sequence[Tensor], states: Sequence[State], params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = Packed.of(tuple(p.shape for p in params), grads[0].dtype, grads[0].device)
        rows, unpack_ = pack_rows(states, _MOMENTS)
        moments = tuple(rows[key].view(-1) for key in _MOMENTS)
        count = torch.stack([state["count"] for state in states])
        features, scale, directions, new, count = self._observe(
            flat(grads), moments, count, flat(params), packed
        )
        for moment, value in zip(moments, new, strict=True):
            moment.copy_(value)
        unpack_()
        torch._foreach_copy_([state["count"] for state in states], list(count.unbind()))
        return features, scale, directions

    def _observe(
        self,
        grad: Tensor,
        moments: tuple[Tensor, ...],
        count: Tensor,
        param: Tensor,
        at: Alone | Packed,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """What does not depend on the weights, of one tensor or of several packed into one.

        Args:
            grad: ``S``, the tensor's shape, or ``(n,)`` packed; ``param`` and ``moments`` likewise.
            count: ``()`` or ``(tensors,)``; per-tensor results likewise.
            at: which coordinates belong to which tensor.

        Returns:
            ``(features, scale, directions, moments, count)``: features ``(14,)``, directions
            ``(*S, 6)``.
        """
        cfg = self.config
        count = count.to(grad.dtype) + 1
        fast, slow, square = (moment.to(grad.dtype) for moment in moments)
        fast = torch.lerp(grad, fast, cfg.fast_beta)
        slow = torch.lerp(grad, slow, cfg.slow_beta)
        square = torch.lerp(grad.square(), square, cfg.square_beta)
        new = (fast, slow, square)
        unbias = at.spread(self._unbias(count))
        fast, slow, square = (moment / by for moment, by in zip(new, unbias, strict=True))
        root = (square + TINY**2).sqrt()
        s_fast, s_slow, s_now = fast / root, slow / root, grad / root
        of = (
            fast.square(), slow.square(), grad.square(), square, root, param.square(),
            s_fast.square(), s_slow.square(), grad * fast, grad * slow,
        )  # fmt: skip
        features, scale, norm = self._features(at.means(torch.stack(of)), count, at)
        norm = at.spread(norm)
        directions = torch.stack(
            (s_fast, s_slow, s_now, fast / norm, slow / norm, s_fast * s_slow.abs()), dim=-1
        )
        return features, scale, directions, new, count

    def _unbias(self, count: Tensor) -> Tensor:
        """By what the three moments are too small after ``count`` steps, ``(3, *)``."""
        cfg = self.config
        return unbias(count, cfg.fast_beta, cfg.slow_beta, cfg.square_beta)

    def _features(
        self, means: Tensor, count: Tensor, at: Alone | Packed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, scale and root mean square of each tensor from means of :func:`_pairs`."""
        moments, (square, root, param), signals, products = means.split((3, 3, 2, 2))
        square = square + TINY**2
        rms = (param + TINY).sqrt()  # differentiable at zero, too
        # How much of the gradient is signal, of the tensor as one; how unequal coordinates are.
        logs = log_ratio(torch.cat((moments, root.square().unsqueeze(0))), square)  # (4, *)
        norms = (moments + TINY**2).sqrt()  # of the momenta and the gradient
        features = torch.cat(
            (
                # How small the tensor is against its natural scale, its shape, and its age.
                torch.stack(
                    (
                        (rms / at.natural).clamp(min=math.exp(-8.0)).log(),
                        at.log_fan_in,
                        at.log_size,
                        at.is_vector,
                        count.clamp(max=10_000.0).log() - 4.0,
                        (count * -0.1).exp(),
                    )
                ),
                logs[:3],
                (signals + 1e-4).log(),  # how much is signal, by coordinate
                logs[3:],
                products / (norms[:2] * norms[2]),  # whether it still goes where it went
            )
        )
        features = features.movedim(0, -1) * self.units
        return features, torch.maximum(rms, at.natural), square.sqrt()

    # ---- the in-place path: one tensor of any size, or several packed into one

    @torch.no_grad()
    def update_blocks_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        read: Callable[[Tensor], Tensor] = as_it_is,
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Two walks over the tensors: moments and statistics, and then the updates.

        The second reads the moments that the first has stored, rounded where state is half.
        """
        dtype, device = self.dtype, grads[0].device
        at = Packed.of(tuple(whole_shape(param) for param in params), dtype, device)
        grads = [grad.reshape(-1) for grad in grads]
        moments = [[state[key].view(-1) for key in _MOMENTS] for state in states]
        means = []
        for grad, own, param in zip(grads, moments, params, strict=True):
            flat_param = param.reshape(-1)
            totals = torch.zeros(_MEANS, dtype=dtype, device=device)
            for block in blocks(len(grad), _BLOCK):
                g, p = read(grad[block]), flat_param[block].to(dtype)
                pairs = _pairs(g, p, *self._advance_(g, [moment[block] for moment in own]))
                totals += torch.stack([a.sum() if b is None else a.dot(b) for a, b in pairs])
            means.append(mean_from_sums(totals, len(grad)))
        factors = self._factors_(torch.stack(means, 1), states, at)
        for index, (grad, own) in enumerate(zip(grads, moments, strict=True)):
            for block in blocks(len(grad), _BLOCK):
                fast, slow, square = (moment[block].to(dtype) for moment in own)
                mine = factors[:, index : index + 1]
                yield index, block, _mixed(read(grad[block]), fast, slow, square, mine)

    @torch.no_grad()
    def update_many_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        record: bool = False,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """As one by one, for a fraction of the calls."""
        if record:
            return super().update_many_(grads, states, params, loss, record)
        at = Packed.of(tuple(p.shape for p in params), self.dtype, params[0].device)
        grad, param = flat(grads), flat(params)
        packed, unpack_ = pack_rows(states, _MOMENTS)
        new = self._advance_(grad, [packed[key].view(-1) for key in _MOMENTS])
        products = grad.new_empty(_MEANS, len(grad))
        for row, (a, b) in zip(products, _pairs(grad, param, *new), strict=True):
            row.copy_(a) if b is None else torch.mul(a, b, out=row)
        factors = at.spread(self._factors_(at.means(products), states, at))
        update = _mixed(grad, *new, factors)
        unpack_()
        return split_like(update, grads), None

    def _advance_(self, grad: Tensor, moments: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Moments after ``grad``, in place, and returned in the rule's dtype."""
        fast, slow, square = new = [moment.to(grad.dtype) for moment in moments]
        fast.lerp_(grad, 1 - self.config.fast_beta)
        slow.lerp_(grad, 1 - self.config.slow_beta)
        beta = self.config.square_beta
        square.mul_(beta).addcmul_(grad, grad, value=1 - beta)
        for value, moment in zip(new, moments, strict=True):
            if value is not moment:  # half-precision state was copied
                moment.copy_(value)
        return fast, slow, square

    def _factors_(self, means: Tensor, states: Sequence[State], at: Packed) -> Tensor:
        """One step of the networks of ``m`` tensors, in place in ``states``.

        Args:
            means: of :func:`_pairs`, of biased moments, ``(10, m)``.

        Returns:
            What :func:`_mixed` multiplies biased moments with, ``(6, m)``.
        """
        own = {key: [state[key] for state in states] for key in ("count", *self.network_state)}
        torch._foreach_add_(own["count"], 1)
        packed = {key: torch.stack(values).to(means.dtype) for key, values in own.items()}
        count = packed.pop("count")
        unbias = self._unbias(count)  # (3, m)
        fast, slow, square = unbias
        squared, one = unbias.square(), torch.ones_like(square)
        root = square.sqrt()
        of_moments = torch.stack((squared[0], squared[1], one, square, root, one))
        means = means / torch.cat((of_moments, squared[:2] / square, unbias[:2]))
        features, scale, norm = self._features(means, count, at)
        gains = self._gains(self.lstm.step_(features, packed), features).t() * scale  # (6, m)
        for key, values in packed.items():
            torch._foreach_copy_(own[key], list(values.unbind()))
        both = unbias[:2]
        of_directions = (both / root, one.unsqueeze(0) / root, both * norm)
        return gains / torch.cat((*of_directions, (fast * slow / square).unsqueeze(0)))


def _pairs(
    grad: Tensor, param: Tensor, fast: Tensor, slow: Tensor, square: Tensor
) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """The products whose means :meth:`SteeredRule._features` reads; ``None`` stands for one."""
    r = (square + TINY**2).rsqrt_()
    s_fast, s_slow = fast * r, slow * r
    return (
        (fast, fast), (slow, slow), (grad, grad), (square, None), (square, r), (param, param),
        (s_fast, s_fast), (s_slow, s_slow), (grad, fast), (grad, slow),
    )  # fmt: skip


def _mixed(grad: Tensor, fast: Tensor, slow: Tensor, square: Tensor, factors: Tensor) -> Tensor:
    """The update ``(n,)`` from biased moments and ``(6, 1)`` or ``(6, n)`` factors."""
    on_fast, on_slow, on_now, raw_fast, raw_slow, on_both = factors
    r = (square + TINY**2).rsqrt_()
    both = slow.abs().mul_(r).mul_(fast)
    update = on_fast * fast
    update.addcmul_(slow, on_slow).addcmul_(grad, on_now).addcmul_(both, on_both).mul_(r)
    return update.addcmul_(fast, raw_fast).addcmul_(slow, raw_slow)
