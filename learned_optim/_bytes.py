"""The bytes of a tensor, without numpy, which a core installation lacks."""

import ctypes

from torch import Tensor


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements of ``tensor`` in row-major order, as they lie in memory."""
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
