"""Compiled kernels of the learned step, and why they are on or off.

The library is plain C: it is built from ``step.cpp`` when the package is installed with a C++
compiler at hand, loaded through ctypes at the first step, and works with any Python and torch.
Where it is missing, or tensors do not suit it, callers use the pure form. The environment variable
``LEARNED_OPTIM_KERNELS=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import warnings
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

SWITCH = "LEARNED_OPTIM_KERNELS"
FOLDER = Path(__file__).parent
SOURCE = FOLDER / "step.cpp"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = FOLDER / f"libstep{SUFFIX}"

#: Entries of a tensor's statistics, and its network's weights, one after another.
STATS = 13
WEIGHTS = 542
#: Constants and addresses per tensor.
_CONSTANTS, _POINTERS = 3, 8

_PARAM_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_CODES = {torch.float32: 0, torch.bfloat16: 4}
_PLAIN = {Tensor, nn.Parameter}

_is_cpu, _dtype, _layout = attrgetter("is_cpu"), attrgetter("dtype"), attrgetter("layout")


def source_hash() -> str:
    """What a library built from the present source calls itself."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None`` and why there is none."""
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"off: {SWITCH}=0"
    if not LIBRARY.is_file():
        return None, f"missing: {LIBRARY.name} was not built when the package was installed"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.lo_source.restype = ctypes.c_char_p
        if library.lo_source().decode() != source_hash():
            return None, f"stale: {LIBRARY.name} was built from another step.cpp"
        sizes = (ctypes.c_int32 * 4)()
        library.lo_sizes(sizes)
        if list(sizes) != [_CONSTANTS, _POINTERS, STATS, WEIGHTS]:
            return None, f"stale: {LIBRARY.name} expects sizes {list(sizes)}"
        library.lo_step.restype = ctypes.c_int32
        library.lo_step.argtypes = [
            ctypes.c_int64,
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_double] * 6,
            ctypes.c_int32,
        ]
    except (OSError, AttributeError) as error:
        return None, f"unusable: {error}"
    return library, f"compiled: {LIBRARY}"


@functools.cache
def _warn_once() -> None:
    why = _load()[1]
    if not why.startswith("off"):
        warnings.warn(
            f"learned_optim runs without its compiled kernel, several times slower ({why}). "
            f"Reinstall the package with a C++ compiler on the path; {SWITCH}=0 silences this.",
            RuntimeWarning,
            stacklevel=3,
        )


def status() -> str:
    """Whether the compiled kernel is used, and if not, why not."""
    return _load()[1]


def _suitable(tensors: list[Tensor], steps: Sequence[Tensor]) -> bool:
    """Plain dense CPU tensors whose memory may be read and written directly."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    everything = [*tensors, *steps]
    return (
        set(map(type, everything)) <= _PLAIN
        and all(map(_is_cpu, everything))
        and set(map(_layout, everything)) == {torch.strided}
        and all(map(Tensor.is_contiguous, everything))
        and not any(map(Tensor.is_neg, everything))
        and not any(map(Tensor.is_inference, everything))
        and not any(map(torch._is_zerotensor, everything))
        and not any(map(torch._is_functional_tensor, everything))
    )


def step_(
    weights: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    fast: Sequence[Tensor],
    slow: Sequence[Tensor],
    square: Sequence[Tensor],
    stats: Sequence[Tensor],
    steps: Sequence[Tensor],
    constants: Sequence[tuple[float, float, float]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    total_steps: float = 0.0,
    maximize: bool = False,
    base: float = 0.03,
    warmup_fraction: float = 0.05,
) -> bool:
    """One step of all tensors in place; false, and nothing done, where the kernel cannot.

    Args:
        weights: the network's, float32 of 542 entries: one for all tensors or one for each.
        params: float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes.
        fast: averages of gradients over ten steps, float32 or bfloat16.
        slow: averages over a hundred steps.
        square: averages of squared gradients.
        stats: float32, 13 entries or more; the first is the initial root mean square.
        steps: float32 scalars, numbers of earlier updates; increased by one.
        constants: initial scale, log fan-in, and 1 for vectors and scalars.
        lr: multiplier of the update.
        weight_decay: decoupled, in units of 1e-3.
        total_steps: of the whole training; 0 where unknown.
        maximize: go up the gradient.
        base: size of a step relative to a tensor's root mean square.
        warmup_fraction: share of ``total_steps`` in which the step size rises.
    """
    if torch.compiler.is_compiling():
        return False
    library, _ = _load()
    if library is None:
        _warn_once()
        return False
    m = len(params)
    if m == 0:
        return True
    columns = (params, grads, fast, slow, square, stats, steps)
    per_tensor = [weights] * m if isinstance(weights, Tensor) else list(weights)
    if len(constants) != m or len(per_tensor) != m or any(len(c) != m for c in columns):
        raise ValueError("step_ needs one of everything per parameter")
    networks = [weights] if isinstance(weights, Tensor) else per_tensor
    if not _suitable([*params, *grads, *fast, *slow, *square, *stats, *networks], steps):
        return False
    sizes = list(map(Tensor.numel, params))
    dtypes, state_dtypes = list(map(_dtype, params)), list(map(_dtype, fast))
    if (
        any(list(map(Tensor.numel, column)) != sizes for column in (grads, fast, slow, square))
        or list(map(_dtype, grads)) != dtypes
        or any(list(map(_dtype, column)) != state_dtypes for column in (slow, square))
        or not set(dtypes) <= _PARAM_CODES.keys()
        or not set(state_dtypes) <= _STATE_CODES.keys()
        or {*map(_dtype, stats), *map(_dtype, steps), *map(_dtype, networks)} != {torch.float32}
        or min(map(Tensor.numel, stats)) < STATS
        or {*map(Tensor.numel, steps)} != {1}
        or {*map(Tensor.numel, networks)} != {WEIGHTS}
    ):
        return False
    codes = [_PARAM_CODES[p] + _STATE_CODES[s] for p, s in zip(dtypes, state_dtypes, strict=True)]
    addresses = array("Q", map(Tensor.data_ptr, chain(*columns, per_tensor)))
    buffers = (array("q", sizes), array("B", codes), addresses, array("d", chain(*constants)))
    if len(buffers[3]) != _CONSTANTS * m:
        raise ValueError("step_ needs three constants per parameter")
    failed = library.lo_step(
        m,
        *(buffer.buffer_info()[0] for buffer in buffers),
        -1.0 if maximize else 1.0,
        lr,
        weight_decay,
        total_steps,
        base,
        warmup_fraction,
        torch.get_num_threads(),
    )
    if failed:  # overlapping or misaligned memory, or none left: nothing was written
        return False
    for param in params:  # a graph that saved a parameter must notice that it changed
        torch._C._increment_version([param])
    return True
