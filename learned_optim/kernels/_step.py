"""From tensors to one call of the library."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from learned_optim._shapes import fan_in, init_scale
from learned_optim.kernels._library import SIZES, library

_POINTERS, _CONSTANTS, _SETTINGS, STATS, _MOST_UNITS = SIZES
_LR_SCALE = 3  # its place among the constants
_INPUTS, _OUTPUTS = (21, 22), 5  # without and with the trust
# Type codes: of the parameter, plus that of the moments.
_PARAM_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}
_PLAIN = {Tensor, nn.Parameter}

_is_cpu, _dtype = attrgetter("is_cpu"), attrgetter("dtype")
_state_entries = itemgetter("fast", "slow", "square", "stats", "step")


def step_(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    config: Sequence[float],
    lr: float | Tensor = 1.0,
    lr_scales: Sequence[float] | None = None,
    decay: float = 0.0,
    maximize: bool = False,
    warmup: int = 0,
    total_steps: float | None = None,
    shapes: Sequence[torch.Size] | None = None,
) -> bool:
    """One step of all tensors in place; false, and nothing done, where the kernel cannot.

    Args:
        network: float32; weight and bias of the hidden layer, ``(u, i)`` and ``(u,)``, of the
            readout, ``(5, u)`` and ``(5,)``, and the direct weight, ``(5, i)``, with 21 or 22
            inputs ``i``. Each with a leading ``m`` gives every tensor a network of its own.
        params: ``m`` contiguous tensors on the CPU, float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes and sizes.
        states: ``fast``, ``slow`` and ``square``, float32 or bfloat16, of the parameters' sizes;
            ``stats``, ``(14,)``, and ``step``, ``()``, float32.
        config: decays of the fast and the slow momentum and of the mean square, base step, largest
            scale and smallest share of it, warm-up share and warm-up steps of the rule's schedule,
            start and gain of the trust.
        lr: multiplier of the updates.
        lr_scales: further multiplier of each tensor.
        decay: ``param *= 1 - decay * lr`` before the update.
        maximize: negate the gradients.
        warmup: updates are multiplied by ``min(1, (step + 1) / warmup)``.
        total_steps: length of the run; ``None`` if it is unknown.
        shapes: of the parameters, if they are flattened.
    """
    if torch.compiler.is_compiling() or _under_a_mode():
        return False
    m = len(params)
    if m == 0:
        return True
    # On other devices nobody misses the library, and nothing is said of it.
    kernel = library() if params[0].is_cpu else None
    if kernel is None:
        return False
    total = 0.0 if total_steps is None else total_steps
    known = total_steps is not None
    if isinstance(total, Tensor) or (known and not 0 < total < math.inf):
        return False
    if len(grads) != m or len(states) != m:
        raise ValueError(f"{m} parameters need as many gradients and states")
    moments_and_own = zip(*map(_state_entries, states), strict=True)
    tensors = [*params, *grads, *chain(*moments_and_own), *network]
    addresses = _addresses(tensors, m)
    if addresses is None:
        return False
    layout = _layout(
        tuple([param.shape for param in params] if shapes is None else shapes),
        tuple(map(_dtype, tensors)),
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
        "d", (sign, float(lr), decay, total, warmup, layout.units, layout.inputs, *config)
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
    _increment_versions(params)
    return True


def _addresses(tensors: list[Tensor], m: int) -> list[int] | None:
    """Where the tensors begin, parameters and gradients first; ``None`` for unusual ones."""
    if not {*map(type, tensors)} <= _PLAIN:
        return None
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
        usual = all(map(_is_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a layout without strides
        return None
    # Anybody may make parameters and gradients, so these may have any of torch's peculiarities.
    if any(map(Tensor.is_neg, tensors[: 2 * m])) or any(map(Tensor.is_inference, tensors[:m])):
        return None
    return addresses if usual else None


def _under_a_mode() -> bool:
    """Whether operations are intercepted: fake tensors, functorch, function and dispatch modes."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return True
    modes = range(torch._C._len_torch_function_stack())
    # A default device is a mode, too, but tells only where new tensors go.
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in modes)


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
    params, grads, own = dtypes[:m], dtypes[m : 2 * m], dtypes[5 * m :]
    fast, slow, square = (dtypes[i * m : (i + 1) * m] for i in (2, 3, 4))
    if not (params == grads and fast == slow == square and {*own} == {torch.float32}):
        return None
    if not ({*params} <= _PARAM_CODES.keys() and {*fast} <= _STATE_CODES.keys()):
        return None
    lead, units, inputs = network[0][:-2], network[1][-1], network[0][-1]
    parts = [(units, inputs), (units,), (_OUTPUTS, units), (_OUTPUTS,), (_OUTPUTS, inputs)]
    if (
        inputs not in _INPUTS
        or lead not in ((), (m,))
        or network != tuple(torch.Size((*lead, *part)) for part in parts)
    ):
        return None
    sizes = list(map(math.prod, shapes))
    weights = list(map(math.prod, network))
    constants: list[float] = []
    for shape in shapes:
        natural = min(init_scale(shape), largest_scale)
        constants += [natural, math.log(fan_in(shape)), float(len(shape) < 2), 1.0]
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(params, fast, strict=True)]
    return _Layout(
        numels=[*sizes * 5, *[STATS] * m, *[1] * m, *weights],
        units=units,
        inputs=inputs,
        network_strides=[4 * math.prod(part) if lead else 0 for part in parts],
        constants=array("d", constants),
        arrays=(array("q", sizes), array("B", codes)),
    )


def _increment_versions(params: Sequence[Tensor]) -> None:
    """A graph that saved a parameter must notice that it changed."""
    try:
        torch._C._increment_version(params)
    except TypeError:  # before torch 2.5, one tensor at a time
        for param in params:
            torch._C._increment_version(param)
