"""From tensors on the CPU to one call of the library."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

import torch
from torch import Tensor

from learned_optim.kernels import _checks
from learned_optim.kernels._library import SIZES, library

_POINTERS, _CONSTANTS, _SETTINGS, STATS, _MOST_UNITS = SIZES
_LR_SCALE = 3  # its place among the constants
# Type codes: of the parameter, plus that of the moments.
_PARAM_CODES = {dtype: code for code, dtype in enumerate(_checks.PARAM_TYPES)}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}


def step_(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    config: Sequence[float],
    lr: float | Tensor,
    lr_scales: Sequence[float] | None,
    decay: float,
    maximize: bool,
    warmup: int,
    total_steps: float,
    shapes: Sequence[torch.Size] | None,
) -> bool:
    """See :func:`learned_optim.kernels.step_`; ``total_steps`` is 0 if it is unknown."""
    kernel = library()
    if kernel is None or (isinstance(lr, Tensor) and not lr.is_cpu):
        return False
    m = len(params)
    moments_and_own = zip(*map(_checks.state_entries, states), strict=True)
    tensors = [*params, *grads, *chain(*moments_and_own), *network]
    addresses = _checks.addresses_of(tensors, m, _checks.is_cpu)
    if addresses is None:
        return False
    layout = _layout(
        tuple([param.shape for param in params] if shapes is None else shapes),
        tuple(map(_checks.dtype_of, tensors)),
        tuple([weight.shape for weight in network]),
        config[4],
    )
    if layout is None or list(map(Tensor.numel, tensors)) != layout.numels:
        return False
    for address, stride in zip(addresses[7 * m :], layout.network_strides, strict=True):
        addresses += [address + stride * i for i in range(m)] if stride else [address] * m
    del addresses[7 * m : 7 * m + len(network)]
    constants = layout.constants
    if lr_scales is not None:
        constants = array("d", constants)
        constants[_LR_SCALE::_CONSTANTS] = array("d", lr_scales)
    sign = -1.0 if maximize else 1.0
    settings = array(
        "d", (sign, float(lr), decay, total_steps, warmup, layout.units, layout.inputs, *config)
    )
    pointers = array("Q", addresses)
    if len(settings) != _SETTINGS:
        raise ValueError(f"the kernel takes {_SETTINGS - 7} entries of config, got {len(config)}")
    failed = kernel.lo_step(
        m,
        *layout.sizes_and_types,
        pointers.buffer_info()[0],
        constants.buffer_info()[0],
        settings.buffer_info()[0],
        torch.get_num_threads(),
    )
    if failed:  # overlapping or misaligned memory, or none left: nothing was written
        return False
    _checks.increment_versions(params)
    return True


@dataclass(frozen=True)
class _Layout:
    """What shapes and dtypes alone determine of a call.

    Attributes:
        numels: sizes of all tensors in the order of the call.
        units: hidden units of the network.
        inputs: of the network.
        network_strides: bytes from one tensor's weights to the next one's, 0 for shared ones.
        constants: those of each tensor.
        arrays: keeps what the addresses in ``sizes_and_types`` point to.
    """

    numels: list[int]
    units: int
    inputs: int
    network_strides: list[int]
    constants: array[float]
    arrays: tuple[array[int], array[int]]

    @cached_property
    def sizes_and_types(self) -> tuple[int, int]:
        sizes, types = self.arrays
        return sizes.buffer_info()[0], types.buffer_info()[0]


@lru_cache(maxsize=64)
def _layout(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    network: tuple[torch.Size, ...],
    largest_scale: float,
) -> _Layout | None:
    """The layout; ``None`` if the kernel does not know the dtypes or the network.

    Args:
        shapes: of the parameters.
        dtypes: of all tensors in the order of the call.
        network: shapes of the weights.
        largest_scale: bound of the initial scale.
    """
    m = len(shapes)
    if not (_checks.takes_dtypes(m, dtypes) and _checks.takes_network(m, network, _MOST_UNITS)):
        return None
    params, fast = dtypes[:m], dtypes[2 * m : 3 * m]
    lead, units, inputs = network[0][:-2], network[1][-1], network[0][-1]
    parts = [shape[len(lead) :] for shape in network]
    sizes = list(map(math.prod, shapes))
    weights = list(map(math.prod, network))
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(params, fast, strict=True)]
    return _Layout(
        numels=[*sizes * 5, *[STATS] * m, *[1] * m, *weights],
        units=units,
        inputs=inputs,
        network_strides=[4 * math.prod(part) if lead else 0 for part in parts],
        constants=array("d", _checks.constants_of(shapes, largest_scale)),
        arrays=(array("q", sizes), array("B", codes)),
    )
