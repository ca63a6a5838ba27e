"""Arguments of a step, and the parts of the step in place that do not depend on the rule.

Small tensors are packed, large ones cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from learned_optim.kernels import StepSettings
from learned_optim.kernels.constants import LARGEST_GRAD
from learned_optim.rules._segments import Segments, cached_in_eager, is_plain_eager

# Coordinates per block: temporaries of a block stay in the cache, and calls cost little beside it.
BLOCK = 1 << 15
# Larger tensors are not packed by rules with dozens of state entries per coordinate: copying those
# costs more than another round of calls.
MOST_PACKED = 1 << 13

State = dict[str, Tensor]
#: A step of tensors that are already known, see :meth:`UpdateRule.bind`.
StepFunction: TypeAlias = Callable[[Sequence[Tensor], StepSettings], bool]


@dataclass(frozen=True)
class StepContext:
    """Inputs of a step besides gradients, state and parameters.

    Attributes:
        step: number of earlier updates of each tensor, in the rule's dtype, shape ``(m,)``.
        loss: the loss at the parameters, shape ``()`` or, one per tensor, ``(m,)``; ``None``
            unless the rule has :attr:`UpdateRule.needs_loss`.
        total_steps: length of the run, a number or a tensor of shape ``()`` or ``(m,)``; ``None``
            if it is unknown.
        rotated: 1 for matrices that are stepped in an eigenbasis, else 0, shape ``(m,)``; ``None``
            if there is none.
    """

    step: Tensor
    loss: Tensor | None = None
    total_steps: float | Tensor | None = None
    rotated: Tensor | None = None

    def of(self, tensors: slice) -> StepContext:
        """The context of some of the tensors."""

        def part(value: Any) -> Any:
            return value[tensors] if isinstance(value, Tensor) and value.dim() else value

        return StepContext(*map(part, (self.step, self.loss, self.total_steps, self.rotated)))


class Shards(NamedTuple):
    """The sharded tensors whose local parts a step takes.

    Attributes:
        shapes: of the whole tensors.
        groups: process groups over which all of them are sharded.
    """

    shapes: Sequence[torch.Size]
    groups: tuple[Any, ...]


# ---- gradients and rates


def sanitize_grad(grad: Tensor, dtype: torch.dtype, maximize: bool = False) -> Tensor:
    """A copy in ``dtype``: NaN and infinity are 0, others are clamped to 2^48."""
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
    grad.clamp_(-LARGEST_GRAD, LARGEST_GRAD)
    return grad.neg_() if maximize else grad


def warmup_factor(step: Tensor, warmup: int) -> Tensor | None:
    """``min(1, (step + 1) / warmup)``, shape ``(m,)``; ``None`` where it is known to be 1."""
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


def states_before(
    lr: float | Tensor, states: Sequence[State], keys: Sequence[str]
) -> list[State] | None:
    """Copies for :func:`restore_where_zero_`; ``None`` if the CPU knows ``lr``."""
    if not needs_sync(lr):
        return None
    return [{key: state[key].clone() for key in keys if key in state} for state in states]


def restore_where_zero_(
    lr: float | Tensor, states: Sequence[State], before: Sequence[State] | None
) -> None:
    """Undo changes of state if a rate that only the device knows is 0."""
    if before is None or not isinstance(lr, Tensor):
        return
    active = lr.reshape(()) != 0
    for state, old in zip(states, before, strict=True):
        for key, value in old.items():
            if value.device == lr.device:
                state[key].copy_(torch.where(active, state[key], value))


# ---- pieces of work


@dataclass(frozen=True)
class Piece:
    """Several small tensors, or consecutive coordinates of one; the unit of work.

    Attributes:
        first: index of the first tensor.
        last: index after the last tensor.
        rows: coordinates of the tensor, if the piece is a part of one; else ``None``.
        segments: of the piece.
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
        """The piece's coordinates, ``(n,)``, of the call's tensors; a view where possible."""
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
        """Write a packed entry ``(n, k)`` back, unless it is a view of the state."""
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


def pieces_of(
    params: Sequence[Tensor], segments: Segments, most_packed: int, whole: bool
) -> list[Piece]:
    """Pieces of at most ``BLOCK`` coordinates.

    Args:
        params: tensors of the call; those that are not contiguous stay in one piece.
        segments: of the call.
        most_packed: coordinates of the largest tensor that is packed together with others.
        whole: leave all tensors in one piece.
    """
    whole = whole or torch.compiler.is_compiling()
    return _pieces(most_packed, tuple(p.is_contiguous() and not whole for p in params), segments)


@cached_in_eager
def _pieces(most_packed: int, cut: tuple[bool, ...], segments: Segments) -> list[Piece]:
    pieces: list[Piece] = []
    first = room = 0

    def close(last: int) -> None:
        if first < last:
            pieces.append(Piece(first, last, None, segments.piece(first, last)))

    for index, size in enumerate(segments.sizes):
        if size > most_packed:
            close(index)
            if not cut[index]:
                pieces.append(Piece(index, index + 1, None, segments.piece(index, index + 1)))
            for start in range(0, size if cut[index] else 0, BLOCK):
                rows = slice(start, min(start + BLOCK, size))
                part = segments.piece(index, index + 1, rows.stop - rows.start)
                pieces.append(Piece(index, index + 1, rows, part))
            first, room = index + 1, BLOCK
        elif size > room:
            close(index)
            first, room = index, BLOCK - size
        else:
            room -= size
    close(len(segments))
    return pieces


def as_rows(value: Tensor) -> Tensor:
    """A view of state ``(*S, k)`` as ``(n, k)``, where ``n`` may be 0."""
    return value.view(math.prod(value.shape[:-1]), value.shape[-1])


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if both are the same view, so that no copy is needed."""
    if torch.compiler.is_compiling() or not is_plain_eager():
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype
