"""The in-place step that every rule inherits: the parts of the pure form, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learned_optim.rules import _base
from learned_optim.rules._segments import Segments, is_plain_eager

if TYPE_CHECKING:
    from learned_optim.rules._base import State, UpdateRule

# Weight decay is in AdamW's units: at lr = 1 it shrinks as AdamW does at its usual lr of 1e-3.
DECAY_UNIT = 1e-3
# Finite gradients are cut off here: their squares, which rules average, fit into float32 even when
# summed over a tensor of two thousand million coordinates.
LARGEST_GRAD = 2.0**48
# Coordinates per block: temporaries of a block stay in the cache, and calls cost little beside it.
# Networks of coordinates have some hundred temporaries per coordinate, others a dozen.
NETWORK_BLOCK, BLOCK = 1 << 13, 1 << 15


@dataclass(frozen=True)
class Piece:
    """Several small tensors, or consecutive coordinates of one; the unit of work.

    Attributes:
        first: index of the first tensor.
        last: index after the last tensor.
        rows: the coordinates of the tensor, if they are but a part of one.
        segments: describes the piece.
    """

    first: int
    last: int
    rows: slice | None
    segments: Segments

    @property
    def tensors(self) -> slice:
        return slice(self.first, self.last)

    def _part(self, rows: Tensor) -> Tensor:
        # Not sliced without need: compiled graphs do not know the sizes of shards.
        return rows if self.rows is None else rows[self.rows]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The piece's coordinates of all tensors of the call, ``(n,)``; a view where possible."""
        if self.last - self.first == 1:
            return self._part(tensors[self.first].reshape(-1))
        return torch.cat([t.reshape(-1) for t in tensors[self.tensors]])

    def pack_rows(self, states: Sequence[State], key: str, dtype: torch.dtype) -> Tensor:
        """A per-coordinate entry, ``(n, k)``, each column contiguous; a view where possible."""
        if self.last - self.first == 1:
            return self._part(as_rows(states[self.first][key])).to(dtype)
        parts = [as_rows(state[key]).t() for state in states[self.tensors]]
        return torch.cat(parts, 1).t().to(dtype)

    def unpack_rows_(self, states: Sequence[State], key: str, value: Tensor) -> None:
        """Write a packed entry ``(n, k)`` back; views that were written to stay as they are."""
        if self.last - self.first == 1:
            target = self._part(as_rows(states[self.first][key]))
            if not same_memory(target, value):
                target.copy_(value)
            return
        targets = [as_rows(state[key]) for state in states[self.tensors]]
        torch._foreach_copy_(targets, list(value.split(self.segments.sizes)))

    def add_(self, params: Sequence[Tensor], update: Tensor, lr: float | Tensor) -> None:
        """``params += lr * update``"""
        scale: float = 1.0
        if isinstance(lr, Tensor) or torch.compiler.is_compiling():
            update = update * lr
        else:
            scale = lr
        if self.last - self.first == 1:
            param = params[self.first]
            target = param if self.rows is None else param.view(-1)[self.rows]
            target.add_(update.view(target.shape), alpha=scale)
            return
        targets = list(params[self.tensors])
        parts = update.split(self.segments.sizes)
        updates = [u.view(t.shape) for u, t in zip(parts, targets, strict=True)]
        torch._foreach_add_(targets, updates, alpha=scale)


def reference_step_(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    warmup: int,
    loss: Tensor | None,
    total_steps: float | None,
    shapes: Sequence[torch.Size] | None,
    shard_groups: tuple[Any, ...],
) -> None:
    """See :meth:`UpdateRule.step_`."""
    if not params:
        return
    dtype, device = rule.dtype, params[0].device
    segments = Segments.of(
        tuple(param.shape for param in params) if shapes is None else tuple(shapes),
        dtype,
        device,
        tuple(param.numel() for param in params),
        shard_groups,
    )
    old_states: list[State] = []
    if needs_sync(lr):  # whether lr is zero, and state must stay, is known on the device alone
        own = ("step", *rule.state_keys)
        old_states = [{key: state[key].clone() for key in own} for state in states]
    if isinstance(lr, Tensor):
        lr = lr.to(device).reshape(())
    if weight_decay != 0:
        torch._foreach_mul_(list(params), 1.0 - DECAY_UNIT * lr * weight_decay)
    steps = [state["step"] for state in states]
    step = torch.stack(steps).to(dtype)
    context = _base.StepContext(step, loss if rule.needs_loss else None, total_steps)
    factor = warmup_factor(step, warmup)
    pieces = pieces_of(rule, params, segments)
    if type(rule).forward is _base.UpdateRule.forward:
        updates = _updates_by_parts(
            rule, pieces, params, grads, states, maximize, segments, context
        )
    else:
        updates = _updates_by_forward(rule, pieces, params, grads, states, maximize, context)
    for piece, update in updates:
        if factor is not None:
            update = update * piece.segments.expand(factor[piece.tensors])
        piece.add_(params, update, lr)
    torch._foreach_add_(steps, 1)
    if old_states and isinstance(lr, Tensor):
        for state, old in zip(states, old_states, strict=True):
            for key, value in old.items():
                state[key].copy_(torch.where(lr != 0, state[key], value))


def _updates_by_parts(
    rule: UpdateRule,
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    maximize: bool,
    segments: Segments,
    context: _base.StepContext,
) -> Iterator[tuple[Piece, Tensor]]:
    """Two passes: moments and means over whole tensors; then features, gains and updates."""
    dtype = rule.dtype
    per_tensor = set(rule.tensor_state)
    moments = [key for key in rule.state_keys if key not in rule.network_state]
    seen: dict[int, tuple[Tensor, State, Tensor]] = {}  # of the only piece, kept for pass two
    sums: list[Tensor] = []

    def observe_(piece: Piece) -> tuple[Tensor, State, Tensor]:
        grad = sanitize_grad(piece.pack(grads), dtype, maximize)
        state = {key: piece.pack_rows(states, key, dtype) for key in moments}
        new = rule.moments(grad, state)
        for key, value in new.items():
            piece.unpack_rows_(states, key, value)
        return grad, {**state, **new}, piece.pack(params).to(dtype)

    def again(piece: Piece) -> tuple[Tensor, State, Tensor]:
        grad = sanitize_grad(piece.pack(grads), dtype, maximize)
        state = {key: piece.pack_rows(states, key, dtype) for key in moments}
        return grad, state, piece.pack(params).to(dtype)

    probe = type(rule).products is not _base.UpdateRule.products
    for index, piece in enumerate(pieces if probe else ()):
        grad, state, param = observe_(piece)
        part = piece.segments.sums(rule.products(grad, state, param))
        if sums and piece.first == pieces[index - 1].first:  # the tensor's next block
            sums[-1] = sums[-1] + part
        else:
            sums.append(part)
        if len(pieces) == 1:
            seen[0] = grad, state, param
    means = segments.mean_from_sums(torch.cat(sums, 1)) if sums else segments.columns[:0]
    features, stats = rule.tensor_features(means, segments, context)
    gains = None
    if rule.rows == "tensors" and features is not None:
        gains = _respond_to_tensors_(rule, features, states)
    for index, piece in enumerate(pieces):
        if not probe:
            grad, state, param = observe_(piece)
        else:
            grad, state, param = seen.pop(index) if index in seen else again(piece)
        own_stats = None if stats is None else piece.segments.expand(stats[:, piece.tensors])
        rows, directions = rule.coordinate_features(grad, state, param, own_stats)
        if rule.rows == "coordinates" and rows is not None:
            network = {
                key: piece.pack_rows(states, key, dtype)
                for key in rule.network_state
                if key not in per_tensor
            }
            answer: Tensor | None = rule.respond_(rows, network)
            for key, value in network.items():
                piece.unpack_rows_(states, key, value)
        else:
            answer = None if gains is None else gains[piece.tensors]
        yield piece, rule.mix(directions, answer, piece.segments)


def _respond_to_tensors_(rule: UpdateRule, features: Tensor, states: Sequence[State]) -> Tensor:
    """Gains ``(m, d)`` of rules that have them per tensor, in place in the network's state."""
    own = {key: [state[key] for state in states] for key in rule.network_state}
    network = {key: torch.stack(values).to(features.dtype) for key, values in own.items()}
    gains = rule.respond_(features, network)
    for key, value in network.items():
        torch._foreach_copy_(own[key], list(value.unbind()))
    return gains


def _updates_by_forward(
    rule: UpdateRule,
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    maximize: bool,
    context: _base.StepContext,
) -> Iterator[tuple[Piece, Tensor]]:
    """For rules that define :meth:`forward` itself."""
    dtype, keys = rule.dtype, rule.state_keys
    for piece in pieces:
        state = {}
        for key in keys:
            if key in rule.tensor_state:
                state[key] = torch.stack([s[key] for s in states[piece.tensors]]).to(dtype)
            else:
                state[key] = piece.pack_rows(states, key, dtype)
        own = _base.StepContext(context.step[piece.tensors], context.loss, context.total_steps)
        grad = sanitize_grad(piece.pack(grads), dtype, maximize)
        update, new = rule(grad, state, piece.pack(params).to(dtype), piece.segments, own)
        for key, value in new.items():
            if key in rule.tensor_state:
                targets = [s[key] for s in states[piece.tensors]]
                torch._foreach_copy_(targets, list(value.unbind()))
            else:
                piece.unpack_rows_(states, key, value)
        yield piece, update


def pieces_of(rule: UpdateRule, params: Sequence[Tensor], segments: Segments) -> list[Piece]:
    """Work in pieces of bounded size: small tensors packed, large ones in blocks."""
    block = NETWORK_BLOCK if rule.rows == "coordinates" else BLOCK
    whole = type(rule).forward is not _base.UpdateRule.forward and not rule.coordinatewise
    compiling = torch.compiler.is_compiling()
    cut = tuple(p.is_contiguous() and not whole and not compiling for p in params)
    if compiling or not is_plain_eager():
        return _pieces(block, cut, segments)
    return _remembered_pieces(block, cut, segments)


@lru_cache(maxsize=64)
def _remembered_pieces(block: int, cut: tuple[bool, ...], segments: Segments) -> list[Piece]:
    return _pieces(block, cut, segments)


def _pieces(block: int, cut: tuple[bool, ...], segments: Segments) -> list[Piece]:
    pieces: list[Piece] = []
    first = room = 0

    def close(last: int) -> None:
        if first < last:
            pieces.append(Piece(first, last, None, segments.piece(first, last)))

    for index, size in enumerate(segments.sizes):
        if size > block:
            close(index)
            if not cut[index]:
                pieces.append(Piece(index, index + 1, None, segments.piece(index, index + 1)))
            for start in range(0, size if cut[index] else 0, block):
                rows = slice(start, min(start + block, size))
                part = segments.piece(index, index + 1, rows.stop - rows.start)
                pieces.append(Piece(index, index + 1, rows, part))
            first, room = index + 1, block
        elif size > room:
            close(index)
            first, room = index, block - size
        else:
            room -= size
    close(len(segments))
    return pieces


def sanitize_grad(grad: Tensor, dtype: torch.dtype, maximize: bool = False) -> Tensor:
    """A new tensor of ``dtype``: NaN and infinity as zero, finite entries cut off at 2^48."""
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
    grad.clamp_(-LARGEST_GRAD, LARGEST_GRAD)
    return grad.neg_() if maximize else grad


def warmup_factor(step: Tensor, warmup: int) -> Tensor | None:
    """``min(1, (step + 1) / warmup)``, shape ``(m,)``; ``None`` if known to be 1 for free."""
    if not warmup:
        return None
    known = step.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain_eager()
    if known and float(step.min()) + 1 >= warmup:
        return None
    return ((step + 1) / warmup).clamp(max=1.0)


def needs_sync(lr: float | Tensor) -> bool:
    """True if reading ``lr`` would synchronize the device or end a compiled graph."""
    if not isinstance(lr, Tensor):
        return False
    return lr.device.type != "cpu" or torch.compiler.is_compiling()


def as_rows(value: Tensor) -> Tensor:
    """State ``(*S, k)`` as ``(n, k)``, also where ``n`` is 0: a view, to be written through."""
    n = 1
    for size in value.shape[:-1]:
        n *= size
    return value.view(n, value.shape[-1])


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if both are the same view, so that nothing is to be copied."""
    if torch.compiler.is_compiling() or not is_plain_eager():
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def zeros_by_column(param: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``(*param.shape, k)``, of which each of the ``k`` columns is contiguous in memory."""
    like = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    return like.unsqueeze(0).repeat(k, *(1,) * param.dim()).movedim(0, -1)
