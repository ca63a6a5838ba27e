"""The steps of the rule ``horizon`` and of LSTM layers on the CPU: calls of the compiled library.

The kernels for other devices and for graphs share their settings and their checks of tensors.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from learned_optim._tensors import fan_in, init_scale
from learned_optim.kernels import constants as c
from learned_optim.kernels._library import library

OUTPUTS = 5
#: Entries of a tensor's state, in the order of a call.
MOMENTS = ("fast", "slow", "square")
STATE_KEYS = (*MOMENTS, "stats", "step")
# Type codes: of the parameter, plus that of the moments.
_PARAM_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}
_PLAIN = {Tensor, nn.Parameter}

is_cpu, is_cuda = attrgetter("is_cpu"), attrgetter("is_cuda")
state_entries = itemgetter(*STATE_KEYS)
_dtype_of, _shape_of = attrgetter("dtype"), attrgetter("shape")


class StepSettings(NamedTuple):
    """The numbers of a step in place.

    Attributes:
        lr: multiplier of the update; a tensor has one element, on the device or the CPU.
        weight_decay: ``param *= 1 - 1e-3 * lr * decay`` before the update, where ``decay`` is what
            :meth:`UpdateRule.scheduled_decay` returns for it.
        maximize: negate the gradients.
        warmup: updates are multiplied by ``min(1, (step + 1) / warmup)``; 0 for none.
        total_steps: length of the run, for rules that read it; ``None`` if it is unknown.
        loss: the loss at the parameters, shape ``()``, for rules that read it.
    """

    lr: float | Tensor = 1.0
    weight_decay: float = 0.0
    maximize: bool = False
    warmup: int = 0
    total_steps: float | None = None
    loss: Tensor | None = None


class StepCall(NamedTuple):
    """All of one step, see :func:`learned_optim.kernels.step_`."""

    network: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    settings: StepSettings
    updates: Sequence[Tensor | None] | None = None


# ---- checks of all kernels


def under_a_mode() -> bool:
    """True if operations are intercepted: fake tensors, functorch, function or dispatch modes."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return True
    depth = torch._C._len_torch_function_stack()
    # A default device is a mode, too, but tells only where new tensors go.
    return depth > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(depth)
    )


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """True if all are exactly tensors or parameters, no subclasses."""
    return {*map(type, tensors)} <= _PLAIN


def addresses_of(tensors: Sequence[Tensor], is_here: Callable[[Tensor], bool]) -> list[int] | None:
    """Addresses of contiguous, plain tensors on the kernel's kind of device; else ``None``."""
    if not are_plain(tensors):
        return None
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
        usual = all(map(is_here, tensors)) and all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a layout without strides
        return None
    return addresses if usual else None


def takes(m: int, dtypes: Sequence[torch.dtype], network: Sequence[torch.Size]) -> bool:
    """True if the kernels take these tensors.

    Args:
        m: number of parameters.
        dtypes: of parameters, gradients, state entries and weights.
        network: shapes of the weights: of one network, shared or with a leading ``m``.
    """
    params, grads, own = dtypes[:m], dtypes[m : 2 * m], dtypes[5 * m :]
    fast, slow, square = (dtypes[i * m : (i + 1) * m] for i in (2, 3, 4))
    lead, units = network[0][:-2], network[1][-1]
    parts = [(units, c.NUM_INPUTS), (units,), (OUTPUTS, units), (OUTPUTS,), (OUTPUTS, c.NUM_INPUTS)]
    return (
        params == grads
        and fast == slow == square
        and {*own} == {torch.float32}
        and {*params} <= _PARAM_CODES.keys()
        and {*fast} <= _STATE_CODES.keys()
        and 1 <= units <= c.MOST_UNITS
        and lead in ((), (m,))
        and tuple(network) == tuple(torch.Size((*lead, *part)) for part in parts)
    )


def constants_of(shapes: Sequence[torch.Size]) -> list[float]:
    """Three numbers per parameter: initial scale, log fan-in, is-vector."""
    constants: list[float] = []
    for shape in shapes:
        scale = min(init_scale(shape), c.LARGEST_SCALE)
        constants += [scale, math.log(fan_in(shape)), float(len(shape) < 2)]
    return constants


def _increment_each(params: Sequence[Tensor]) -> None:
    for param in params:
        torch._C._increment_version(param)


#: Counts a change of parameters, so that graphs which saved them raise errors.
increment_versions = torch._C._increment_version if torch.__version__ >= "2.5" else _increment_each


# ---- the step


def step_(call: StepCall) -> bool:
    """See :func:`learned_optim.kernels.step_`."""
    bound = bind(call.network, call.params, call.states)
    return bound is not None and bound(call.grads, call.settings, call.updates)


def bind(
    network: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
) -> BoundStep | None:
    """A step without its gradients and settings; ``None`` for tensors the library refuses."""
    kernel = library()
    if kernel is None:
        return None
    m = len(params)
    fixed = [*chain(*zip(*map(state_entries, states), strict=True)), *network]
    addresses = addresses_of(fixed, is_cpu)
    if addresses is None or not are_plain(params):
        return None
    shapes = tuple(map(_shape_of, params))
    layout = _layout(
        shapes,
        tuple(map(_dtype_of, params)),
        tuple(map(_dtype_of, fixed)),
        tuple(map(_shape_of, network)),
    )
    if layout is None or list(map(Tensor.numel, fixed)) != layout.fixed_numels:
        return None
    pointers = [0] * (3 * m) + addresses[: 5 * m]  # parameters, gradients and updates: later
    for address, stride in zip(addresses[5 * m :], layout.network_strides, strict=True):
        pointers += [address + stride * i for i in range(m)] if stride else [address] * m
    return BoundStep(kernel, params, fixed, addresses, layout, array("Q", pointers), list(shapes))


@dataclass(frozen=True, eq=False)
class BoundStep:
    """The step of parameters, states and weights that stay the same tensors.

    Attributes:
        kernel: the library.
        params: ``m`` parameters, checked in full at each step.
        fixed: state entries and weights, already checked; each step compares their addresses.
        addresses: of ``fixed``.
        layout: of all tensors.
        pointers: ``(13, m)``: parameters, gradients, updates, state entries, weights; each step
            fills in the first three rows.
        shapes: of ``params``.
    """

    kernel: ctypes.CDLL
    params: Sequence[Tensor]
    fixed: list[Tensor]
    addresses: list[int]
    layout: _Layout
    pointers: array[int]
    shapes: list[torch.Size]

    def __call__(
        self,
        grads: Sequence[Tensor],
        settings: StepSettings,
        updates: Sequence[Tensor | None] | None = None,
    ) -> bool:
        """One step; false, and nothing done, if a tensor does not suit the library or has moved."""
        lr, params, layout, pointers = settings.lr, self.params, self.layout, self.pointers
        if (
            under_a_mode()
            or list(map(Tensor.data_ptr, self.fixed)) != self.addresses
            or list(map(_shape_of, params)) != self.shapes
        ):
            return False
        varying, m = [*params, *grads], len(params)
        if len(varying) != 2 * m or (isinstance(lr, Tensor) and not lr.is_cpu):
            return False
        addresses = addresses_of(varying, is_cpu)
        if (
            addresses is None
            # Parameters and gradients are the user's, and may be any kind of view.
            or any(map(Tensor.is_neg, varying))
            or any(map(Tensor.is_inference, params))
            or list(map(_dtype_of, varying)) != layout.varying_dtypes
            or list(map(Tensor.numel, varying)) != layout.varying_numels
        ):
            return False
        pointers[: 2 * m] = array("Q", addresses)
        if updates is not None:
            places = addresses_of_updates(updates, layout.varying_numels, is_cpu)
            if places is None:
                return False
            pointers[2 * m : 3 * m] = array("Q", places)
        numbers = array(
            "d",
            (
                -1.0 if settings.maximize else 1.0, float(lr), c.DECAY_UNIT * settings.weight_decay,
                settings.total_steps or 0.0, settings.warmup, layout.units,
            ),
        )  # fmt: skip
        failed = self.kernel.lo_step(
            m,
            layout.sizes.buffer_info()[0],
            layout.types.buffer_info()[0],
            pointers.buffer_info()[0],
            layout.constants.buffer_info()[0],
            numbers.buffer_info()[0],
            torch.get_num_threads(),
        )
        if failed:  # overlapping or misaligned memory, or none left: nothing was written
            return False
        increment_versions(params)
        return True


def addresses_of_updates(
    updates: Sequence[Tensor | None], numels: Sequence[int], is_here: Callable[[Tensor], bool]
) -> list[int] | None:
    """Addresses of updates, 0 for none; ``None`` if a tensor does not fit."""
    given = [update for update in updates if update is not None]
    if addresses_of(given, is_here) is None:
        return None
    places = []
    for update, numel in zip(updates, numels, strict=False):
        if update is None:
            places.append(0)
        elif update.dtype is torch.float32 and update.numel() == numel:
            places.append(update.data_ptr())
        else:
            return None
    return places


class _Layout(NamedTuple):
    """The part of a call that shapes and dtypes determine.

    Attributes:
        varying_dtypes: of parameters and gradients.
        varying_numels: sizes of parameters and gradients.
        fixed_numels: sizes of state entries and weights.
        units: hidden units of the network.
        network_strides: bytes from one tensor's weights to the next one's, 0 for shared ones.
        constants: see :func:`constants_of`.
        sizes: of the parameters.
        types: codes of each parameter's and its moments' dtypes.
    """

    varying_dtypes: list[torch.dtype]
    varying_numels: list[int]
    fixed_numels: list[int]
    units: int
    network_strides: list[int]
    constants: array[float]
    sizes: array[int]
    types: array[int]


@lru_cache(maxsize=64)
def _layout(
    shapes: tuple[torch.Size, ...],
    params: tuple[torch.dtype, ...],
    fixed: tuple[torch.dtype, ...],
    network: tuple[torch.Size, ...],
) -> _Layout | None:
    """The layout; ``None`` if the kernel does not know the dtypes or the network.

    Args:
        shapes: of the parameters.
        params: dtypes of the parameters, and of their gradients.
        fixed: dtypes of state entries and weights.
        network: shapes of the weights.
    """
    m = len(shapes)
    if not takes(m, (*params, *params, *fixed), network):
        return None
    lead, units = network[0][:-2], network[1][-1]
    parts = [shape[len(lead) :] for shape in network]
    sizes = list(map(math.prod, shapes))
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(params, fixed[:m], strict=True)]
    return _Layout(
        varying_dtypes=[*params * 2],
        varying_numels=[*sizes * 2],
        fixed_numels=[*sizes * 3, *[c.NUM_STATS] * m, *[1] * m, *map(math.prod, network)],
        units=units,
        network_strides=[4 * math.prod(part) if lead else 0 for part in parts],
        constants=array("d", constants_of(shapes)),
        sizes=array("q", sizes),
        types=array("B", codes),
    )


# ---- stacks of LSTM layers


def lstm_step_(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor], layers: int
) -> bool:
    """One step of a stack of LSTM layers in place; false, and nothing done, if refused.

    Args:
        x: features of ``n`` rows, ``(n, inputs)``, float32, any strides.
        hidden: hidden states of all layers side by side, ``(n, layers * units)``, float32, whose
            rows or columns do not interleave in memory. Fastest with contiguous columns.
        cell: cell states, in the same form.
        weights: ``weight_ih, weight_hh, bias_ih, bias_hh`` of each layer, as ``nn.LSTM`` has them.
        layers: number of layers.
    """
    if under_a_mode() or not x.is_cpu:
        return False
    states, rows, units = (x, hidden, cell), len(x), weights[1].shape[-1]
    every = (*states, *weights)
    if not are_plain(every) or any(map(Tensor.is_neg, states)):
        return False
    if not all(t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided for t in every):
        return False
    if any(map(Tensor.is_inference, (hidden, cell))) and not torch.is_inference_mode_enabled():
        return False
    inputs = [x.shape[-1], *[units] * (layers - 1)]
    shapes = [
        shape
        for wide in inputs
        for shape in ((4 * units, wide), (4 * units, units), (4 * units,), (4 * units,))
    ]
    if [tuple(weight.shape) for weight in weights] != shapes:
        return False
    if not all(weight.is_contiguous() for weight in weights):
        return False
    if x.dim() != 2 or not hidden.shape == cell.shape == (rows, layers * units):
        return False
    kernel = library()
    if kernel is None:
        return False
    sizes = array("q", (inputs[0], units, layers))
    pointers = array("Q", [tensor.data_ptr() for tensor in (*states, *weights)])
    strides = array("q", [stride for tensor in states for stride in tensor.stride()])
    failed = kernel.lo_lstm_step(
        rows,
        sizes.buffer_info()[0],
        pointers.buffer_info()[0],
        strides.buffer_info()[0],
        torch.get_num_threads(),
    )
    if failed:  # overlapping or misaligned memory, none left, or a compiler without vector types
        return False
    # Tensors of inference mode have no versions.
    increment_versions([own for own in (hidden, cell) if not own.is_inference()])
    return True
