"""Packed tensors: the tensor of each coordinate, and features of the tensors' shapes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from learned_optim._tensors import fan_in, init_scale

# A product of two tensors of coordinates to be averaged; ``None`` stands for ones.
Product = tuple[Tensor, Tensor | None]
_Value = TypeVar("_Value")

# Mean tensor length above which a call per tensor is cheaper than an index per coordinate.
_LONG = 1 << 10


def is_plain_eager() -> bool:
    """False under fake tensors and other modes that replace every new tensor."""
    return _get_current_dispatch_mode() is None


def cached_in_eager(function: Callable[..., _Value]) -> Callable[..., _Value]:
    """Cache results, because steps repeat arguments; not in graphs or under modes."""
    cached = lru_cache(maxsize=64)(function)

    def call(*arguments: Any) -> _Value:
        if torch.compiler.is_compiling() or not is_plain_eager():
            return function(*arguments)
        with torch.inference_mode(False):  # inference tensors could not be used anywhere else
            return cached(*arguments)

    return call


class Segments:
    """``m`` tensors, flattened and packed one after the other into ``n`` coordinates.

    Args:
        shapes: shapes of the whole tensors.
        dtype: dtype of the per-tensor values.
        device: device of the coordinates.
        sizes: numbers of coordinates at hand, smaller than the whole tensors for shards and for
            pieces of large tensors; those of the whole tensors if not given.
        shard_groups: process groups over which the tensors are sharded, the same for all of them.

    Attributes:
        sizes: coordinates of each tensor at hand, ``m`` integers.
        numel: coordinates of each whole tensor, at least 1, shape ``(m,)``.
        init_scale: see :func:`learned_optim._tensors.init_scale`, shape ``(m,)``.
        log_fan_in: log of the inputs per output, shape ``(m,)``.
        log_size: log of ``numel``, shape ``(m,)``.
        is_vector: 1 for tensors of fewer than two dimensions, else 0, shape ``(m,)``.
        shard_groups: as given.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        sizes: Sequence[int] | None = None,
        shard_groups: tuple[Any, ...] = (),
    ) -> None:
        numel = [math.prod(shape) for shape in shapes]
        self.sizes = list(numel if sizes is None else sizes)
        self.shard_groups = shard_groups
        values = [
            [float(max(1, count)) for count in numel],
            [init_scale(shape) for shape in shapes],
            [math.log(fan_in(shape)) for shape in shapes],
            [math.log(max(1, count)) for count in numel],
            [float(len(shape) < 2) for shape in shapes],
        ]
        self._set(torch.tensor(values, dtype=dtype, device=device).view(5, len(shapes)))

    def _set(self, columns: Tensor) -> None:
        self.columns = columns
        self._ids: Tensor | None = None
        self.numel, self.init_scale, self.log_fan_in, self.log_size, self.is_vector = columns

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def n(self) -> int:
        """Number of packed coordinates at hand."""
        return sum(self.sizes)

    @property
    def ids(self) -> Tensor:
        """Index of the tensor that each coordinate belongs to, shape ``(n,)``."""
        if self._ids is None:
            device = self.columns.device
            counts = torch.tensor(self.sizes, device=device)
            tensors = torch.arange(len(self), device=device)
            self._ids = tensors.repeat_interleave(counts, output_size=self.n)
        return self._ids

    def piece(self, first: int, last: int, size: int | None = None) -> Segments:
        """Tensors ``first`` to ``last - 1``, or ``size`` coordinates of the first."""
        part = copy.copy(self)
        part.sizes = self.sizes[first:last] if size is None else [size]
        part._set(self.columns[:, first:last])
        return part

    def expand(self, values: Tensor) -> Tensor:
        """From one value per tensor, ``(*, m)``, to one per coordinate, ``(*, n)``."""
        lead = values.shape[:-1]
        if len(self) == 1:
            return values.expand(*lead, self.sizes[0])
        if not self._by_tensor():
            return values.index_select(-1, self.ids)
        parts = zip(values.split(1, -1), self.sizes, strict=True)
        return torch.cat([part.expand(*lead, size) for part, size in parts], -1)

    def sums(self, products: Sequence[Product]) -> Tensor:
        """Sums of products over the coordinates at hand of each tensor.

        Args:
            products: ``k`` pairs of tensors of shape ``(n,)``; ``(a, None)`` stands for ``a``.

        Returns:
            Shape ``(k, m)``.
        """
        if len(self) == 1:
            each = [a.sum() if b is None else a.dot(b) for a, b in products]
            return torch.stack(each).unsqueeze(1)
        values = torch.stack([a if b is None else a * b for a, b in products])
        if self._by_tensor():
            return torch.stack([part.sum(1) for part in values.split(self.sizes, 1)], 1)
        lengths = torch.tensor(self.sizes, device=values.device).expand(len(values), -1)
        return torch.segment_reduce(
            values, "sum", lengths=lengths.contiguous(), axis=1, unsafe=True
        )

    def mean_from_sums(self, sums: Tensor) -> Tensor:
        """Means over the whole tensors, from :meth:`sums` over the coordinates at hand.

        On shards this is one all-reduce, which every rank must take part in.

        Args:
            sums: shape ``(k, m)``; may be overwritten.
        """
        for group in self.shard_groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums / self.numel

    def mean(self, values: Tensor) -> Tensor:
        """Means over each whole tensor of ``(k, n)`` values, ``(k, m)``; 0 for empty tensors."""
        return self.mean_from_sums(self.sums([(row, None) for row in values]))

    def _by_tensor(self) -> bool:
        """True if a call per tensor is cheaper than indices, or the only way."""
        kind = self.columns.device.type
        if torch.compiler.is_compiling() or kind not in ("cpu", "cuda") or not is_plain_eager():
            return True
        return kind == "cpu" and self.n >= _LONG * len(self)


#: Cached :class:`Segments`, by position.
segments_of = cached_in_eager(Segments)


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, asked without importing torch.distributed."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
