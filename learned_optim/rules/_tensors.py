"""What rules with per-tensor statistics ask of a tensor, or of many packed into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from learned_optim.rules._base import tensor_of_each
from learned_optim.rules._shards import whole_mean, whole_shape

# Keeps 0 / 0 at 0. Gradients below it count as zero; it is far below any a float32 network has.
TINY = 1e-15
# Scale of a vector (bias, norm gain) whose entries are smaller: fan-in says nothing about it.
VECTOR_SCALE = 0.1
# Mean number of coordinates from which packed tensors are walked over one by one.
LONG = 1 << 10


def _natural_scale(shape: Sequence[int]) -> float:
    """What a tensor of this shape is drawn at: ``1 / sqrt(fan_in)``, 0.1 for vectors."""
    return VECTOR_SCALE if len(shape) < 2 else _fan_in(shape) ** -0.5


def _fan_in(shape: Sequence[int]) -> int:
    """Inputs per output, as torch counts them for linear and convolutional weights."""
    return max(1, math.prod(shape[1:]))


class Alone:
    """One tensor, or a shard of one: per-tensor values have shape ``()``."""

    def __init__(self, param: Tensor) -> None:
        whole = whole_shape(param)
        self.natural = param.new_tensor(_natural_scale(whole))
        self.log_fan_in = param.new_tensor(math.log(_fan_in(whole)))
        self.log_size = param.new_tensor(math.log(max(1, whole.numel())))
        self.is_vector = param.new_tensor(float(len(whole) < 2))

    def means(self, values: Tensor) -> Tensor:
        """Over the tensor, of ``(k, *S)``: ``(k,)``."""
        return whole_mean(*values)

    def spread(self, value: Tensor) -> Tensor:
        return value


class Packed:
    """Several tensors flattened into one: per-tensor values have shape ``(tensors,)``."""

    def __init__(
        self, shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.sizes = [shape.numel() for shape in shapes]
        self.lengths = torch.tensor(self.sizes, device=device)
        self.counts = column([float(max(1, size)) for size in self.sizes])
        self.natural = column([_natural_scale(shape) for shape in shapes])
        self.log_fan_in = column([math.log(_fan_in(shape)) for shape in shapes])
        self.log_size = self.counts.log()
        self.is_vector = column([float(len(shape) < 2) for shape in shapes])
        # A call per tensor beats an index per coordinate where calls are cheap and tensors long.
        self._long = device.type == "cpu" and sum(self.sizes) >= LONG * len(self.sizes)

    @staticmethod
    @lru_cache(maxsize=16)
    def of(shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device) -> Packed:
        """The packing of these shapes, remembered: every step of an optimizee asks for it."""
        return Packed(shapes, dtype, device)

    @cached_property
    def owner(self) -> Tensor:
        """Which tensor each coordinate belongs to, ``(n,)``."""
        return tensor_of_each(self.sizes, self.lengths.device)

    def means(self, values: Tensor) -> Tensor:
        """Over each tensor, of ``(k, n)``: ``(k, tensors)``."""
        if self._long:
            sums = torch.stack([part.sum(1) for part in values.split(self.sizes, 1)], 1)
        else:
            lengths = self.lengths.expand(len(values), -1).contiguous()
            sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=1, unsafe=True)
        return sums / self.counts

    def spread(self, value: Tensor) -> Tensor:
        """From one of each tensor, ``(*, tensors)``, to one of each coordinate, ``(*, n)``."""
        if not self._long:
            return value.index_select(-1, self.owner)
        lead = value.shape[:-1]
        each = zip(value.split(1, -1), self.sizes, strict=True)
        return torch.cat([part.expand(*lead, size) for part, size in each], -1)


def log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), not below -16, so that zero has a value."""
    return (x / reference).clamp(min=math.exp(-16.0), max=math.exp(16.0)).log()


def unbias(count: Tensor, *betas: float) -> Tensor:
    """By what moments of these decays are too small after ``count`` steps, ``(betas, *)``."""
    return torch.stack([-torch.expm1(count * math.log(beta)) for beta in betas])
