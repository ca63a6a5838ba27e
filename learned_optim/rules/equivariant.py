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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim.rules._base import (
    RecurrentRule,
    RuleConfig,
    State,
    as_it_is,
    as_rows,
    blocks,
    flat,
    pack_rows,
    split_like,
    zeros_by_feature,
)
from learned_optim.rules._shards import mean_from_sums, whole_shape
from learned_optim.rules._stack import LSTMStack, widened
from learned_optim.rules._tensors import TINY, Alone, Packed, log_ratio, unbias

_EVEN, _ODD = 15, 3  # features the network reads; directions it mixes
_SAID = 8  # features of those, the last ones, that are said of whole tensors
# Coordinates per block of the in-place path: cheaper ones than in the LSTM rule, so more of them.
_BLOCK = 1 << 14


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
    """Whether what is said of whole tensors also reaches the gains directly, past the LSTM."""


class EquivariantRule(RecurrentRule):
    """LSTM gains on normalized momenta, relative to the tensor's scale.

    ``update = -scale * exp(a) * (s_fast + b_1 s_fast + b_2 s_slow + b_3 s_now)`` with
    ``s = m_hat / sqrt(v_hat)`` and ``a``, ``b`` read out from the LSTM and, if ``direct``, from
    what is said of the tensor: a bounded network that starts from nothing takes several steps to
    say that weights are a hundred times below their scale, and those are the steps that count.
    State per coordinate: ``moments`` (fast, slow, square) and the LSTM's; per tensor: ``count``.
    """

    name = "equivariant"
    Config = EquivariantConfig
    coordinatewise = False
    pack_below = 1 << 13
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
        self.direct: nn.Linear | None = None
        if self.config.direct:
            self.direct = nn.Linear(_SAID, 1 + _ODD, bias=False)
            nn.init.zeros_(self.direct.weight)

    def _widened(self, name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
        return widened(name, own, narrow)

    def init_state(self, param: Tensor) -> State:
        return {
            "moments": zeros_by_feature(param, 3, self.dtype),
            "count": torch.zeros((), dtype=self.dtype, device=param.device),
            **self.lstm.zero_state(param, self.dtype),
        }

    def observe(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Signals ``(*param.shape, 19)``: 15 even features, 3 odd directions, the scale."""
        cfg, at = self.config, Alone(param)
        count = state["count"].to(grad.dtype) + 1
        fast, slow, square = state["moments"].to(grad.dtype).unbind(-1)
        fast = torch.lerp(grad, fast, cfg.fast_beta)
        slow = torch.lerp(grad, slow, cfg.slow_beta)
        square = torch.lerp(grad.square(), square, cfg.square_beta)
        new_state = {"moments": torch.stack((fast, slow, square), -1), "count": count}

        unbias = self._unbias(count)
        fast, slow, square = fast / unbias[0], slow / unbias[1], square / unbias[2]
        size = (square + TINY**2).sqrt()
        s_fast, s_slow = fast / size, slow / size
        s_now = (grad / size).clamp(-3.0, 3.0)
        of = (square, param.square(), fast.square(), slow.square(), grad.square())
        means = at.means(torch.stack(of))
        per_tensor, scale, mean_square = self._about(means, count, at)
        per_coordinate = (
            s_fast.abs() - 0.5,
            s_slow.abs() - 0.5,
            s_now.abs() - 0.5,
            s_fast * s_slow,
            s_now * s_fast,
            log_ratio(square, mean_square) / 8.0,
            torch.tanh(param.abs() / scale) - 0.5,
        )
        signals = torch.cat(
            (
                torch.stack(per_coordinate, -1),
                per_tensor.expand(*grad.shape, -1),
                torch.stack((s_fast, s_slow, s_now), -1),
                scale.expand_as(grad).unsqueeze(-1),
            ),
            dim=-1,
        )
        return signals, new_state

    def _unbias(self, count: Tensor) -> Tensor:
        """By what the three moments are too small after ``count`` steps, ``(3, *)``."""
        cfg = self.config
        return unbias(count, cfg.fast_beta, cfg.slow_beta, cfg.square_beta)

    def _about(
        self, means: Tensor, count: Tensor, at: Alone | Packed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is said of whole tensors: the features, the scale and the mean square.

        Args:
            means: of the unbiased mean square, and of the squares of the parameter, the unbiased
                momenta and the gradient, ``(5,)`` or ``(5, tensors)``; ``count`` likewise.
        """
        mean_square = means[0] + TINY**2
        rms = (means[1] + TINY).sqrt()  # differentiable at zero, too
        features = torch.stack(
            (
                # How small the tensor is against its natural scale.
                (rms / at.natural).clamp(min=math.exp(-8.0)).log() / 4.0,
                at.log_fan_in / 8.0,
                at.is_vector,
                (count.clamp(max=10_000.0).log() - 4.0) / 4.0,
                (-count / 10.0).exp(),
                *(log_ratio(means[2:], mean_square) / 4.0),
            ),
            dim=-1,
        )
        return features, torch.maximum(rms, at.natural), mean_square

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        signals, observed = self.observe(grad, state, param, loss)
        out, network = self.lstm.step(signals[..., :_EVEN], state)
        return self._read_out(out, signals), {**observed, **network}

    def respond(self, signals: Tensor, state: State) -> tuple[Tensor, State]:
        out, network = self.lstm.sequence(signals[..., :_EVEN].contiguous(), state)
        return self._read_out(out, signals), network

    def _read_out(self, out: Tensor, signals: Tensor) -> Tensor:
        """Updates ``(*S,)`` from hidden states ``(*S, hidden_size)`` and signals ``(*S, 19)``."""
        gains = self.readout(out)
        if self.direct is not None:
            gains = gains + self.direct(signals[..., _EVEN - _SAID : _EVEN])
        # The exponent is bounded: steps of e^-5 to e^5 times the initial one.
        log_step = 5.0 * torch.tanh(gains[..., 0] / 2.5)
        directions = signals[..., _EVEN : _EVEN + _ODD]
        mixed = (gains[..., 1:] * directions).sum(-1) + directions[..., 0]
        return -self.config.initial_step * signals[..., -1] * log_step.exp() * mixed

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
        """Two walks over the tensors: what is said of each as a whole, and then the updates."""
        dtype, device = self.dtype, grads[0].device
        at = Packed.of(tuple(whole_shape(param) for param in params), dtype, device)
        grads = [grad.reshape(-1) for grad in grads]
        params = [param.reshape(-1) for param in params]
        own = ("moments", *self.network_state)
        rows = [{key: as_rows(state[key]) for key in own} for state in states]
        means = []
        for grad, state, param in zip(grads, rows, params, strict=True):
            totals = torch.zeros(5, dtype=dtype, device=device)
            for block in blocks(len(grad), _BLOCK):
                g, p = read(grad[block]), param[block].to(dtype)
                fast, slow, square = self._moments(g, state["moments"][block])
                dots = (square.sum(), p.dot(p), fast.dot(fast), slow.dot(slow), g.dot(g))
                totals += torch.stack(dots)
            means.append(mean_from_sums(totals, len(grad)))
        counts = [state["count"] for state in states]
        torch._foreach_add_(counts, 1)
        said = self._said(torch.stack(means, 1), torch.stack(counts).to(dtype), at)
        for index, (grad, state, param) in enumerate(zip(grads, rows, params, strict=True)):
            features, facts = said[0][index : index + 1], said[1][:, index : index + 1]
            for block in blocks(len(grad), _BLOCK):
                g, p = read(grad[block]), param[block].to(dtype)
                moments = self._moments(g, state["moments"][block])
                part = {key: value[block] for key, value in state.items()}
                yield index, block, self._update_rows_(g, p, moments, part, features, facts)

    @torch.no_grad()
    def update_many_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        record: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """As one by one, for a fraction of the calls; the record is the signals, ``(n, 19)``."""
        at = Packed.of(tuple(p.shape for p in params), self.dtype, params[0].device)
        counts = [state["count"] for state in states]
        torch._foreach_add_(counts, 1)
        grad, param = flat(grads), flat(params)
        packed, unpack_ = pack_rows(states, ("moments", *self.network_state))
        moments = self._moments(grad, packed["moments"])
        fast, slow, square = moments
        of = (square, param.square(), fast.square(), slow.square(), grad.square())
        said = self._said(at.means(torch.stack(of)), torch.stack(counts).to(grad.dtype), at)
        update, n = torch.empty_like(grad), len(grad)
        signals = grad.new_empty(n, _EVEN + _ODD + 1) if record else None
        for block in blocks(n, _BLOCK):
            part = {key: value[block] for key, value in packed.items()}
            seen = None if signals is None else signals[block]
            update[block] = self._update_rows_(
                grad[block], param[block], moments[:, block], part, *said, at.owner[block], seen
            )
        unpack_()
        return split_like(update, grads), signals

    def _moments(self, grad: Tensor, before: Tensor) -> Tensor:
        """The moments after ``grad``, ``(3, n)``, from those before, ``(n, 3)``."""
        moments = before.t().to(grad.dtype, copy=True, memory_format=torch.contiguous_format)
        fast, slow, square = moments
        fast.lerp_(grad, 1 - self.config.fast_beta)
        slow.lerp_(grad, 1 - self.config.slow_beta)
        square.lerp_(grad.square(), 1 - self.config.square_beta)
        return moments

    def _said(self, means: Tensor, count: Tensor, at: Packed) -> tuple[Tensor, Tensor]:
        """What is said of ``m`` tensors, from means as in :meth:`_about`, of biased moments.

        Returns:
            ``(features, facts)``: features ``(m, 8)``; and ``(5, m)``, by what the three moments
            are too small, the scale, and the mean square.
        """
        unbias = self._unbias(count)  # (3, m)
        means = means.clone()
        means[0] /= unbias[2]
        means[2:4] /= unbias[:2].square()
        features, scale, mean_square = self._about(means, count, at)
        return features, torch.cat((unbias, scale.unsqueeze(0), mean_square.unsqueeze(0)))

    def _update_rows_(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Tensor,
        state: State,
        features: Tensor,
        facts: Tensor,
        owner: Tensor | None = None,
        signals: Tensor | None = None,
    ) -> Tensor:
        """One block of ``n`` rows, in place in ``state``; features lie in rows of ``(7, n)``.

        Args:
            moments: after ``grad``, ``(3, n)``; overwritten.
            features: see :meth:`_said`; ``facts`` likewise.
            owner: which tensor each row belongs to, ``(n,)``; ``None`` where there is but one.
            signals: ``(n, 19)``, written to where given: what :meth:`observe` would return.
        """
        state["moments"].copy_(moments.t())
        if owner is not None:
            facts = facts.index_select(1, owner)
        scale, mean_square = facts[3], facts[4]
        moments.div_(facts[:3])
        square = moments[2]
        x, directions = grad.new_empty(7, len(grad)), grad.new_empty(3, len(grad))
        *_, slow_fast, now_fast, log_square, size = x
        s_fast, s_slow, s_now = directions
        torch.div(square, mean_square, out=log_square).clamp_(math.exp(-16.0), math.exp(16.0))
        log_square.log_().div_(8.0)
        one_over_size = square.add_(TINY**2).rsqrt_()
        torch.mul(moments[:2], one_over_size, out=directions[:2])
        torch.mul(grad, one_over_size, out=s_now).clamp_(-3.0, 3.0)
        torch.abs(directions, out=x[:3]).sub_(0.5)
        torch.mul(s_fast, s_slow, out=slow_fast)
        torch.mul(s_now, s_fast, out=now_fast)
        # tanh(z) = 2 sigmoid(2z) - 1, which is several times cheaper: as in the network.
        torch.div(param, scale, out=size).abs_().mul_(2.0).sigmoid_().mul_(2.0).sub_(1.5)

        network = {key: state[key].to(grad.dtype) for key in self.network_state}
        out = self.lstm.step_(x.t(), network, features, owner)
        for key, value in network.items():
            if value is not state[key]:  # half-precision state was copied
                state[key].copy_(value)
        if signals is not None:
            said = features if owner is None else features.index_select(0, owner)
            signals.copy_(torch.cat((x.t(), said, directions.t(), scale.unsqueeze(1)), 1))
        bias = self.readout.bias.unsqueeze(1)  # (4, 1), or below (4, m) and (4, n)
        if self.direct is not None:
            bias = torch.addmm(bias, self.direct.weight, features.t())
            bias = bias if owner is None else bias.index_select(1, owner)
        gains = torch.addmm(bias, self.readout.weight, out.t())
        step = gains[0].mul_(0.8).sigmoid_().mul_(10.0).sub_(5.0).exp_()
        gains[1].add_(1.0)
        mixed = gains[1:].mul_(directions).sum(0)
        return mixed.mul_(step).mul_(scale).mul_(-self.config.initial_step)
