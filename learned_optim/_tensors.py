"""Bytes, place in memory and initial scale of tensors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

# Initial scale of vectors (biases, norm gains): a fan-in says nothing about them.
VECTOR_SCALE = 0.1


def tensor_bytes(tensor: Tensor) -> bytes:
    """Elements in row-major order; without numpy, which a core installation lacks."""
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def has_values(tensor: Tensor) -> bool:
    """False for fake tensors and tensors on the meta device."""
    return tensor.device.type != "meta" and not hasattr(tensor, "fake_mode")


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """True if contiguous tensors of one storage follow each other in memory."""
    if not all(has_values(t) and t.is_contiguous() for t in tensors):
        return False
    first, size = tensors[0], tensors[0].numel() * tensors[0].element_size()
    places = [t.data_ptr() - first.data_ptr() for t in tensors]
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    return len(storages) == 1 and places == [size * i for i in range(len(tensors))]


def init_scale(shape: Sequence[int]) -> float:
    """Scale of a tensor's initial values: ``1 / sqrt(fan_in)``, 0.1 for vectors."""
    return VECTOR_SCALE if len(shape) < 2 else fan_in(shape) ** -0.5


def fan_in(shape: Sequence[int]) -> int:
    """Inputs per output, as torch counts them for linear and convolutional weights."""
    return max(1, math.prod(shape[1:]))
