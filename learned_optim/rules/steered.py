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

from learned_optim.rules import _shards
from learned_optim.rules._base import RuleConfig, State, TensorRule, as_it_is, blocks
from learned_optim.rules._stack import LSTMStack
from learned_optim.rules._tensors import TINY, Alone, Packed, log_ratio

_FEATURES, _DIRECTIONS = 14, 6
# Coordinates per block of the in-place path: ten float32 vectors of this length stay in L2.
_BLOCK = 1 << 14


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


class SteeredRule(TensorRule):
    """Per-tensor LSTM gains on per-coordinate momenta, relative to the tensor's scale.

    With ``f``, ``s`` the bias-corrected momenta, ``g`` the gradient, ``r`` the coordinate's root
    mean square and ``R`` the tensor's,

        update = -scale * exp(a) * (f/r + b_1 f/r + b_2 s/r + b_3 g/r
                                    + b_4 f/R + b_5 s/R + b_6 f/r |s/r|)

    where ``a`` and ``b`` are read out from the tensor's LSTM. State per coordinate: ``fast``,
    ``slow`` and ``square``, each ``(*S, 1)``; per tensor: ``count`` and the LSTM's.
    """

    name = "steered"
    Config = SteeredConfig
    coordinatewise = False
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
        moments = tuple(state[key].squeeze(-1) for key in ("fast", "slow", "square"))
        features, scale, directions, new, count = self._observe(
            grad, moments, state["count"], param, Alone(param)
        )
        out, network = self.lstm.step(features, state)
        update = (directions * (self._gains(out) * scale.unsqueeze(-1))).sum(-1)
        fast, slow, square = (value.unsqueeze(-1) for value in new)
        return update, {"fast": fast, "slow": slow, "square": square, "count": count, **network}

    def gains(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        out, network = self.lstm.sequence(features, state)
        return self._gains(out), network

    def _gains(self, out: Tensor) -> Tensor:
        """``(*, 6)`` gains of the directions, in units of the scale, from ``(*, hidden_size)``."""
        read = self.readout(out)
        # The exponent is bounded: steps of e^-5 to e^5 times the initial one.
        step = self.config.initial_step * (5.0 * torch.tanh(read[..., :1] / 2.5)).exp()
        mix = torch.cat((read[..., 1:2] + 1.0, read[..., 2:]), dim=-1)
        return -step * mix

    @torch.no_grad()
    def observe_many_(
        self, grads: Sequence[Tensor], states: Sequence[State], params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = Packed.of(tuple(p.shape for p in params), grads[0].dtype, grads[0].device)
        grad = torch.cat([grad.reshape(-1) for grad in grads])
        param = torch.cat([param.reshape(-1) for param in params])
        own = {key: [s[key].view(-1) for s in states] for key in ("fast", "slow", "square")}
        moments = tuple(torch.cat(values).to(grad.dtype) for values in own.values())
        count = torch.stack([state["count"] for state in states])
        features, scale, directions, new, count = self._observe(grad, moments, count, param, packed)
        for values, value in zip(own.values(), new, strict=True):
            torch._foreach_copy_(values, list(value.split(packed.sizes)))
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
        betas = (cfg.fast_beta, cfg.slow_beta, cfg.square_beta)
        unbias = [-torch.expm1(count * math.log(beta)) for beta in betas]
        fast, slow, square = (
            moment / at.spread(by) for moment, by in zip(new, unbias, strict=True)
        )
        root = (square + TINY**2).sqrt()
        s_fast, s_slow, s_now = fast / root, slow / root, grad / root
        means = at.means(
            param.square(), square, root, fast.square(), slow.square(), grad.square(),
            grad * fast, grad * slow, s_fast.square(), s_slow.square(),
        )  # fmt: skip
        features, scale, norm = self._features(torch.stack(means), count, at)
        norm = at.spread(norm)
        directions = torch.stack(
            (s_fast, s_slow, s_now, fast / norm, slow / norm, s_fast * s_slow.abs()), dim=-1
        )
        return features, scale, directions, new, count

    def _features(
        self, means: Tensor, count: Tensor, at: Alone | Packed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, scale and root mean square of each tensor from ten means ``(10, *)``."""
        param, square, root, fast, slow, now, now_fast, now_slow, s_fast, s_slow = means.unbind()
        rms = (param + TINY).sqrt()  # differentiable at zero, too
        square = square + TINY**2

        def floored(mean_square: Tensor) -> Tensor:
            return (mean_square + TINY**2).sqrt()

        features = torch.stack(
            (
                # How small the tensor is against its natural scale, its shape, and its age.
                (rms / at.natural).clamp(min=math.exp(-8.0)).log() / 4.0,
                at.log_fan_in / 8.0,
                at.log_size / 12.0,
                at.is_vector,
                (count.clamp(max=10_000.0).log() - 4.0) / 4.0,
                (-count / 10.0).exp(),
                # How much of the gradient is signal: of the tensor as one, and by coordinate.
                log_ratio(fast, square) / 4.0,
                log_ratio(slow, square) / 4.0,
                log_ratio(now, square) / 4.0,
                (s_fast + 1e-4).log() / 4.0,
                (s_slow + 1e-4).log() / 4.0,
                # How unequal its coordinates are.
                log_ratio(root.square(), square) / 4.0,
                # Whether it still goes where it went.
                now_fast / (floored(now) * floored(fast)),
                now_slow / (floored(now) * floored(slow)),
            ),
            dim=-1,
        )
        return features, torch.maximum(rms, at.natural), square.sqrt()

    @torch.no_grad()
    def update_blocks_(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        loss: Tensor | None = None,
        read: Callable[[Tensor], Tensor] = as_it_is,
    ) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`forward` in place and block by block, where that pays: on one whole CPU tensor."""
        if (
            grad.device.type != "cpu"  # the gains become Python numbers
            or grad.numel() == 0
            or _shards.cut()
            or any(state[key].dtype != self.dtype for key in ("fast", "slow", "square"))
        ):
            yield from super().update_blocks_(grad, state, param, loss, read)
            return
        cfg, size = self.config, grad.numel()
        moments = [state[key].view(-1) for key in ("fast", "slow", "square")]
        count = state["count"].add_(1)
        c_fast, c_slow, c_square = (
            -math.expm1(count.item() * math.log(beta))
            for beta in (cfg.fast_beta, cfg.slow_beta, cfg.square_beta)
        )
        flat_grad, flat_param = grad.reshape(-1), param.reshape(-1)
        sums = torch.zeros(10, dtype=torch.float64)
        scratch = torch.empty(3, min(size, _BLOCK), dtype=self.dtype)
        for block in blocks(size, _BLOCK):
            g, p = read(flat_grad[block]), flat_param[block].to(self.dtype)
            fast, slow, square = (moment[block] for moment in moments)
            r, sf, ss = (buffer[: len(g)] for buffer in scratch)
            fast.lerp_(g, 1 - cfg.fast_beta)
            slow.lerp_(g, 1 - cfg.slow_beta)
            square.mul_(cfg.square_beta).addcmul_(g, g, value=1 - cfg.square_beta)
            torch.add(square, TINY**2, out=r).rsqrt_()
            torch.mul(fast, r, out=sf)
            torch.mul(slow, r, out=ss)
            dots = (
                p.dot(p), square.sum(), square.dot(r), fast.dot(fast), slow.dot(slow), g.dot(g),
                g.dot(fast), g.dot(slow), sf.dot(sf), ss.dot(ss),
            )  # fmt: skip
            sums += torch.stack(dots)
        unbias = torch.tensor(
            (
                1, c_square, c_square**0.5, c_fast**2, c_slow**2, 1,
                c_fast, c_slow, c_fast**2 / c_square, c_slow**2 / c_square,
            ),
            dtype=torch.float64,
        )  # fmt: skip
        means = (sums / (size * unbias)).to(self.dtype)
        at = Packed.of((param.shape,), self.dtype, param.device)
        features, scale, norm = self._features(means.unsqueeze(1), count.unsqueeze(0), at)
        network = {key: state[key].unsqueeze(0) for key in self.network_state}
        out = self.lstm.step_(features, network)[0]
        gains = (self._gains(out) * scale).double().tolist()
        k = c_square**0.5
        on_fast, on_slow, on_now, on_both = (
            gains[0] * k / c_fast,
            gains[1] * k / c_slow,
            gains[2] * k,
            gains[5] * k * k / (c_fast * c_slow),
        )
        raw_fast, raw_slow = gains[3] / (c_fast * norm.item()), gains[4] / (c_slow * norm.item())
        for block in blocks(size, _BLOCK):
            g = read(flat_grad[block])
            fast, slow, square = (moment[block] for moment in moments)
            r, product = (buffer[: len(g)] for buffer in scratch[:2])
            torch.add(square, TINY**2, out=r).rsqrt_()
            torch.abs(slow, out=product).mul_(r).mul_(fast)
            u = fast * on_fast
            u.add_(slow, alpha=on_slow).add_(g, alpha=on_now).add_(product, alpha=on_both).mul_(r)
            yield block, u.add_(fast, alpha=raw_fast).add_(slow, alpha=raw_slow)
