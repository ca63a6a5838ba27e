"""What a rule may ask about a whole tensor while it sees only one shard of it.

A sharded parameter (DTensor: FSDP2, tensor parallelism) is updated shard by shard: the rule is
handed local tensors, which is all a coordinatewise rule needs. A rule with per-tensor statistics
takes them with :func:`whole_mean` and sizes with :func:`whole_shape`; on an ordinary tensor these
are the plain mean and shape, on a shard they speak of the whole tensor, and every rank gets the
same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Cut:
    """How the tensor being updated was cut."""

    shape: torch.Size
    """Shape of the whole tensor."""
    groups: tuple[Any, ...]
    """Process groups along which the shards lie; none if every rank holds the whole tensor."""


_cut: _Cut | None = None


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, asked without importing torch.distributed."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


@contextmanager
def shards_of(tensor: Any, shape: torch.Size) -> Iterator[None]:
    """Let a rule's statistics speak of the whole of ``tensor`` while it works on the local shard.

    Args:
        tensor: a DTensor.
        shape: shape of the whole tensor as the rule sees it (complex ones as pairs of reals).
    """
    global _cut
    groups = [
        tensor.device_mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    ]
    outer, _cut = _cut, _Cut(shape, tuple(groups))
    try:
        yield
    finally:
        _cut = outer


def whole_shape(param: Tensor) -> torch.Size:
    """Shape of the whole tensor that ``param`` is, or is a shard of."""
    return param.shape if _cut is None else _cut.shape


def whole_mean(*values: Tensor) -> Tensor:
    """Means over all coordinates of the whole tensor.

    Call it equally often on every rank, also for an empty shard, and with several values at once
    rather than several times: on a sharded tensor every call is one all-reduce.

    Args:
        values: tensors of the parameter's shape, one dtype: one number for every coordinate.

    Returns:
        Shape ``(len(values),)``; zeros for a tensor without coordinates.
    """
    totals = torch.stack([value.sum() for value in values])
    return mean_from_sums(totals, values[0].numel())


def mean_from_sums(totals: Tensor, count: int) -> Tensor:
    """:func:`whole_mean` from sums over the ``count`` coordinates at hand, ``(values,)``."""
    if _cut is not None:
        for group in _cut.groups:
            torch.distributed.all_reduce(totals, group=group)
        count = _cut.shape.numel()
    return totals / max(1, count)
