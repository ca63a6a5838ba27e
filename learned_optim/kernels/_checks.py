"""Which tensors the kernels take, and what the shapes of the parameters say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from learned_optim._tensors import fan_in, init_scale
from learned_optim.kernels.constants import LARGEST_SCALE

PARAM_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_TYPES = (torch.float32, torch.bfloat16)
OUTPUTS = 5
INPUTS = 23
PLAIN = {Tensor, nn.Parameter}

is_cpu, is_cuda = attrgetter("is_cpu"), attrgetter("is_cuda")
dtype_of, shape_of = attrgetter("dtype"), attrgetter("shape")
#: Entries of a tensor's state, in the order of a call.
STATE_KEYS = ("fast", "slow", "square", "stats", "step")
state_entries = itemgetter(*STATE_KEYS)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is exactly a tensor or a parameter, not a subclass."""
    return type(tensor) in PLAIN


def addresses_of(tensors: Sequence[Tensor], is_here: Callable[[Tensor], bool]) -> list[int] | None:
    """Where the tensors begin; ``None`` if any is a subclass's, elsewhere or not contiguous.

    Args:
        tensors: some tensors of a call.
        is_here: whether a tensor is on the kernel's kind of device.
    """
    if not {*map(type, tensors)} <= PLAIN:
        return None
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
        usual = all(map(is_here, tensors)) and all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # a layout without strides
        return None
    return addresses if usual else None


def under_a_mode() -> bool:
    """Whether operations are intercepted: fake tensors, functorch, function and dispatch modes."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return True
    modes = range(torch._C._len_torch_function_stack())
    # A default device is a mode, too, but tells only where new tensors go.
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in modes)


def takes_dtypes(m: int, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the kernels know the dtypes of a call of ``m`` tensors, in its order."""
    params, grads, own = dtypes[:m], dtypes[m : 2 * m], dtypes[5 * m :]
    fast, slow, square = (dtypes[i * m : (i + 1) * m] for i in (2, 3, 4))
    same = params == grads and fast == slow == square and {*own} == {torch.float32}
    return same and {*params} <= {*PARAM_TYPES} and {*fast} <= {*STATE_TYPES}


def takes_network(m: int, network: Sequence[torch.Size], most_units: int) -> bool:
    """Whether the weights have shapes that go together, shared or one network per tensor."""
    lead, units = network[0][:-2], network[1][-1]
    parts = [(units, INPUTS), (units,), (OUTPUTS, units), (OUTPUTS,), (OUTPUTS, INPUTS)]
    return (
        1 <= units <= most_units
        and lead in ((), (m,))
        and tuple(network) == tuple(torch.Size((*lead, *part)) for part in parts)
    )


def constants_of(shapes: Sequence[torch.Size]) -> list[float]:
    """Three numbers per parameter: initial scale, log fan-in, is-vector."""
    constants: list[float] = []
    for shape in shapes:
        scale = min(init_scale(shape), LARGEST_SCALE)
        constants += [scale, math.log(fan_in(shape)), float(len(shape) < 2)]
    return constants


def increment_versions(params: Sequence[Tensor]) -> None:
    """A graph that saved a parameter must notice that it changed."""
    try:
        torch._C._increment_version(params)
    except (RuntimeError, TypeError):  # before torch 2.5, one tensor at a time
        for param in params:
            torch._C._increment_version(param)
