"""From tensors to one call of the library."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn

from learned_optim.kernels._library import SIZES, library

_POINTERS, _CONSTANTS, _SETTINGS, STATS, _MOST_UNITS = SIZES
_INPUTS, _OUTPUTS = 21, 5
# Type codes: of the parameter, plus that of the moments.
_PARAM_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}
_PLAIN = {Tensor, nn.Parameter}
_FLOAT32 = {torch.float32}
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max

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
        network: float32; weight and bias of the hidden layer, ``(u, 21)`` and ``(u,)``, of the
            readout, ``(5, u)`` and ``(5,)``, and the direct weight, ``(5, 21)``. Each with a
            leading ``m`` gives every tensor a network of its own.
        params: ``m`` contiguous tensors on the CPU, float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes and sizes.
        states: ``fast``, ``slow`` and ``square``, float32 or bfloat16, of the parameters' sizes;
            ``stats``, ``(14,)``, and ``step``, ``()``, float32.
        config: decays of the fast and the slow momentum and of the mean square, base step, largest
            scale, warm-up share and warm-up steps of the rule's schedule.
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
    kernel = library()
    if kernel is None:
        return False
    m = len(params)
    if m == 0:
        return True
    total = 0.0 if total_steps is None else total_steps
    if isinstance(total, Tensor) or (total_steps is not None and not 0 < total < math.inf):
        return False
    lr = float(lr)
    fast, slow, square, stats, steps = zip(*map(_state_entries, states), strict=True)
    moments = [*fast, *slow, *square]
    own = [*stats, *steps, *network]
    tensors = [*params, *grads, *moments, *own]
    if len(grads) != m or len(states) != m or not {*map(type, tensors)} <= _PLAIN:
        return False
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
        plain = all(map(_is_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a layout without strides
        return False
    if (
        not plain
        or any(map(Tensor.is_neg, tensors[: 2 * m]))
        or any(map(Tensor.is_inference, params))
    ):
        return False
    dtypes, state_dtypes = list(map(_dtype, tensors[: 2 * m])), list(map(_dtype, moments))
    layout = _layout(
        tuple([param.shape for param in params] if shapes is None else shapes),
        tuple(dtypes[:m]),
        tuple(state_dtypes[:m]),
        config[4],
    )
    if layout is None:
        return False
    sizes, types, constants = layout
    units = network[1].shape[-1]
    lead = m if network[0].dim() == 3 else 1
    if (
        list(map(Tensor.numel, tensors[: 5 * m])) != sizes.tolist() * 5
        or dtypes[:m] != dtypes[m:]
        or state_dtypes != state_dtypes[:m] * 3
        or {*map(_dtype, own)} != _FLOAT32
        or list(map(Tensor.numel, own))
        != [STATS] * m + [1] * m + [lead * size for size in _network_sizes(units)]
    ):
        return False
    networks = addresses[7 * m :]
    del addresses[7 * m :]
    for address, size in zip(networks, _network_sizes(units), strict=True):
        stride = 4 * size if lead == m and network[0].dim() == 3 else 0
        addresses += [address + stride * i for i in range(m)] if stride else [address] * m
    if lr_scales is not None:
        constants = array("d", constants)
        for i, scale in enumerate(lr_scales):
            constants[_CONSTANTS * i + 3] = scale
    settings = array("d", (-1.0 if maximize else 1.0, lr, decay, total, warmup, units, *config))
    if len(settings) != _SETTINGS or len(constants) != _CONSTANTS * m:
        raise ValueError(
            f"the kernel takes {_SETTINGS - 6} entries of config, got {len(config)}, and a scale "
            f"of lr for each of {m} tensors"
        )
    pointers = array("Q", addresses)
    failed = kernel.lo_step(
        m,
        sizes.buffer_info()[0],
        types.buffer_info()[0],
        pointers.buffer_info()[0],
        constants.buffer_info()[0],
        settings.buffer_info()[0],
        torch.get_num_threads(),
    )
    if failed:  # overlapping or misaligned memory, or none left: nothing was written
        return False
    _increment_versions(params)
    return True


def _under_a_mode() -> bool:
    """Whether operations are intercepted: fake tensors, functorch, function and dispatch modes."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@lru_cache(maxsize=64)
def _layout(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    state_dtypes: tuple[torch.dtype, ...],
    largest_scale: float,
) -> tuple[array[int], array[int], array[float]] | None:
    """Sizes, type codes and constants of tensors; ``None`` if the kernel does not know a dtype."""
    if not ({*dtypes} <= _PARAM_CODES.keys() and {*state_dtypes} <= _STATE_CODES.keys()):
        return None
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(dtypes, state_dtypes, strict=True)]
    constants: list[float] = []
    for shape in shapes:
        fan_in = max(1, math.prod(shape[1:]))
        scale = 0.1 if len(shape) < 2 else fan_in**-0.5
        constants += [min(scale, largest_scale), math.log(fan_in), float(len(shape) < 2), 1.0]
    return array("q", map(math.prod, shapes)), array("B", codes), array("d", constants)


@lru_cache(maxsize=8)
def _network_sizes(units: int) -> list[int]:
    return [units * _INPUTS, units, _OUTPUTS * units, _OUTPUTS, _OUTPUTS * _INPUTS]


def _increment_versions(params: Sequence[Tensor]) -> None:
    """A graph that saved a parameter must notice that it changed."""
    try:
        torch._C._increment_version(params)
    except TypeError:  # before torch 2.5, one tensor at a time
        for param in params:
            torch._C._increment_version(param)
