"""Views of one parameter: local shards, complex numbers as pairs of reals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learned_optim.rules._segments import is_sharded


def local(tensor: Any) -> Any:
    """The local shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_grad(grad: Any, param: Any) -> Any:
    """The gradient of the parameter's local shard."""
    if not is_sharded(param):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def shard_groups(param: Any) -> tuple[Any, ...]:
    """Process groups over which ``param`` is sharded, if any."""
    if not is_sharded(param):
        return ()
    return tuple(
        param.device_mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate()
    )


def shard_like(param: Any, value: Tensor) -> Tensor:
    """Per-coordinate state of a shard as a DTensor sharded like ``param``."""
    shape = torch.Size((*param.shape, *value.shape[param.dim() :]))
    return shard_of(shape, value, param.device_mesh, param.placements)


def shard_of(shape: torch.Size, part: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A DTensor of this shape, of which the rank has ``part``; nothing is sent."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def real(tensor: Tensor) -> Tensor:
    """Complex tensors as real views, ``(*S, 2)``; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_shape(param: Tensor) -> torch.Size:
    """Shape of the whole parameter as the rule sees it."""
    return torch.Size((*param.shape, 2)) if param.is_complex() else param.shape


def dense(value: Tensor) -> Tensor:
    """Per-coordinate state ``(*S, k)`` that can be viewed as ``(n, k)``."""
    if value.is_contiguous() or value.movedim(-1, 0).is_contiguous():
        return value
    return value.contiguous()
