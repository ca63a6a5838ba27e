"""The step of tensors on the CPU: one call of the compiled library."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from learned_optim.kernels import _checks
from learned_optim.kernels._call import StepSettings, StepTensors
from learned_optim.kernels._library import CONFIG, SIZES, library

_POINTERS, _CONSTANTS, _, STATS, _MOST_UNITS = SIZES
Updates: TypeAlias = Sequence["Tensor | None"] | None
_LR_SCALE = 3  # its place among the constants
# Type codes: of the parameter, plus that of the moments.
_PARAM_CODES = {dtype: code for code, dtype in enumerate(_checks.PARAM_TYPES)}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}


def step_(tensors: StepTensors, settings: StepSettings) -> bool:
    """See :func:`learned_optim.kernels.step_`."""
    bound = bind(tensors, settings.config[4])
    return bound is not None and bound.run_first(tensors.grads, settings, tensors.updates)


def bind(tensors: StepTensors, largest_scale: float) -> BoundStep | None:
    """All of a call but gradients and settings; ``None`` for tensors the library does not take."""
    kernel = library()
    if kernel is None:
        return None
    network, params, _, states, shapes, lr_scales, updates = tensors
    m = len(params)
    fixed = [*chain(*zip(*map(_checks.state_entries, states), strict=True)), *network]
    addresses = _checks.addresses_of(fixed, _checks.is_cpu)
    if addresses is None or not {*map(type, params)} <= _checks.PLAIN:
        return None
    layout = _layout(
        tuple([param.shape for param in params] if shapes is None else shapes),
        tuple(map(_checks.dtype_of, params)),
        tuple(map(_checks.dtype_of, fixed)),
        tuple([weight.shape for weight in network]),
        largest_scale,
    )
    if layout is None or list(map(Tensor.numel, fixed)) != layout.fixed_numels:
        return None
    constants = layout.constants
    if lr_scales is not None:
        constants = array("d", constants)
        constants[_LR_SCALE::_CONSTANTS] = array("d", lr_scales)
    pointers = [0] * (3 * m) + addresses[: 5 * m]  # parameters, gradients and updates: later
    for address, stride in zip(addresses[5 * m :], layout.network_strides, strict=True):
        pointers += [address + stride * i for i in range(m)] if stride else [address] * m
    return BoundStep(kernel, params, fixed, addresses, layout, constants, array("Q", pointers))


class BoundStep:
    """A call of the library whose parameters, states and weights stay the same tensors.

    Args:
        kernel: the library.
        params: ``m`` parameters, of which each step asks everything again.
        fixed: state entries and weights. They were found to suit the library; a step asks whether
            they are still where they were.
        addresses: of ``fixed``.
        layout: of all tensors.
        constants: those of each parameter.
        pointers: ``(12, m)``: parameters, gradients, state entries, weights; the first two rows
            are filled in by each step.
    """

    def __init__(
        self,
        kernel: ctypes.CDLL,
        params: Sequence[Tensor],
        fixed: list[Tensor],
        addresses: list[int],
        layout: _Layout,
        constants: array[float],
        pointers: array[int],
    ) -> None:
        self._step = kernel.lo_step
        self._params, self._fixed, self._addresses = params, fixed, addresses
        self._layout, self._constants, self._pointers = layout, constants, pointers
        self._shapes = list(map(_checks.shape_of, params))

    def run(self, grads: Sequence[Tensor], settings: StepSettings, updates: Updates = None) -> bool:
        """One step; false, and nothing done, unless all tensors are what and where they were."""
        if list(map(Tensor.data_ptr, self._fixed)) != self._addresses:
            return False
        if list(map(_checks.shape_of, self._params)) != self._shapes:
            return False
        return self.run_first(grads, settings, updates)

    def run_first(
        self, grads: Sequence[Tensor], settings: StepSettings, updates: Updates = None
    ) -> bool:
        """One step right after :func:`bind`, which has looked at state and weights.

        Returns:
            False, and nothing done, if parameters or gradients do not suit the library.

        Raises:
            ValueError: ``settings.config`` has another number of entries than the library takes.
        """
        config, lr, decay, maximize, warmup, total_steps = settings
        params, layout, pointers = self._params, self._layout, self._pointers
        varying, m = [*params, *grads], len(params)
        if len(varying) != 2 * m or (isinstance(lr, Tensor) and not lr.is_cpu):
            return False
        addresses = _checks.addresses_of(varying, _checks.is_cpu)
        if (
            addresses is None
            # Parameters and gradients are the user's, and may be any kind of view.
            or any(map(Tensor.is_neg, varying))
            or any(map(Tensor.is_inference, params))
            or list(map(_checks.dtype_of, varying)) != layout.varying_dtypes
            or list(map(Tensor.numel, varying)) != layout.varying_numels
        ):
            return False
        pointers[: 2 * m] = array("Q", addresses)
        if updates is not None:
            pointers[2 * m : 3 * m] = array(
                "Q", [0 if u is None else u.data_ptr() for u in updates]
            )
        numbers = array(
            "d",
            (
                -1.0 if maximize else 1.0, float(lr), decay, total_steps, warmup, layout.units,
                layout.inputs, *config,
            ),
        )  # fmt: skip
        if len(config) != CONFIG:
            raise ValueError(f"the kernel takes {CONFIG} entries of config, got {len(config)}")
        failed = self._step(
            m,
            *layout.sizes_and_types,
            pointers.buffer_info()[0],
            self._constants.buffer_info()[0],
            numbers.buffer_info()[0],
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
        varying_dtypes: of parameters and gradients.
        varying_numels: sizes of parameters and gradients.
        fixed_numels: sizes of state entries and weights.
        units: hidden units of the network.
        inputs: of the network.
        network_strides: bytes from one tensor's weights to the next one's, 0 for shared ones.
        constants: those of each tensor.
        arrays: keeps what the addresses in ``sizes_and_types`` point to.
    """

    varying_dtypes: list[torch.dtype]
    varying_numels: list[int]
    fixed_numels: list[int]
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
    params: tuple[torch.dtype, ...],
    fixed: tuple[torch.dtype, ...],
    network: tuple[torch.Size, ...],
    largest_scale: float,
) -> _Layout | None:
    """The layout; ``None`` if the kernel does not know the dtypes or the network.

    Args:
        shapes: of the parameters.
        params: dtypes of the parameters, and of their gradients.
        fixed: dtypes of state entries and weights.
        network: shapes of the weights.
        largest_scale: bound of the initial scale.
    """
    m = len(shapes)
    if not _checks.takes_dtypes(m, (*params, *params, *fixed)):
        return None
    if not _checks.takes_network(m, network, _MOST_UNITS):
        return None
    lead, units, inputs = network[0][:-2], network[1][-1], network[0][-1]
    parts = [shape[len(lead) :] for shape in network]
    sizes = list(map(math.prod, shapes))
    weights = list(map(math.prod, network))
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(params, fixed[:m], strict=True)]
    return _Layout(
        varying_dtypes=[*params * 2],
        varying_numels=[*sizes * 2],
        fixed_numels=[*sizes * 3, *[STATS] * m, *[1] * m, *weights],
        units=units,
        inputs=inputs,
        network_strides=[4 * math.prod(part) if lead else 0 for part in parts],
        constants=array("d", _checks.constants_of(shapes, largest_scale)),
        arrays=(array("q", sizes), array("B", codes)),
    )
