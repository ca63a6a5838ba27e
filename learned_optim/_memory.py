"""Where tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def has_values(tensor: Tensor) -> bool:
    """False for fake tensors and tensors on the meta device, whose values cannot be read."""
    return tensor.device.type != "meta" and not hasattr(tensor, "fake_mode")


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """True if contiguous tensors of one storage follow each other in memory."""
    if not all(has_values(t) and t.is_contiguous() for t in tensors):
        return False
    first, size = tensors[0], tensors[0].numel() * tensors[0].element_size()
    places = [t.data_ptr() - first.data_ptr() for t in tensors]
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    return len(storages) == 1 and places == [size * i for i in range(len(tensors))]
