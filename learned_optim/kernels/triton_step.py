"""From tensors on a GPU to two launches of the Triton kernels, for any number of tensors.

Written without a GPU at hand: the kernels have been run in Triton's interpreter and compiled for
GPUs, no more. So each kind of call is tried on a small problem before it is trusted.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from learned_optim._warn import warn
from learned_optim.kernels import _build, _checks
from learned_optim.kernels._call import StepSettings, StepTensors
from learned_optim.kernels._library import SIZES
from learned_optim.kernels.constants import DECAY_UNIT

# Coordinates of a program, and of one pass of its loop.
CHUNK, BLOCK = 4096, 512
_MEASURE_BLOCK = 1024  # coordinates of one pass of the loop that measures a new tensor
_ROW = 16  # of gains and of sums
*_, STATS, _INPUTS, _MOST_UNITS = SIZES
# In the interpreter a kernel runs on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
is_here = _checks.is_cpu if INTERPRETED else _checks.is_cuda

_Value = TypeVar("_Value")


@functools.cache
def _imported() -> tuple[ModuleType | None, str]:
    try:
        import triton

        from learned_optim.kernels import _triton
    except ImportError as error:
        return None, f"missing: {error}"
    except Exception as error:  # an installation that is broken or of an unknown version
        return None, f"unusable: {error}"
    return _triton, f"triton {triton.__version__}"


_failure = ""


def loaded() -> tuple[ModuleType | None, str]:
    """The kernels, or ``None``; and which Triton there is, or why they are not used."""
    if _build.switched_off():
        return None, f"off: {_build.SWITCH}=0"
    return (None, f"failed: {_failure}") if _failure else _imported()


def fail(why: str) -> None:
    """Switch the kernels off for this process, and warn once."""
    global _failure
    if not _failure:
        _failure = why
        warn(
            f"learned_optim runs without its Triton kernels, several times slower ({why}). "
            f"{_build.SWITCH}=0 silences this.",
            RuntimeWarning,
        )


class _Cache(dict[Hashable, _Value], Generic[_Value]):
    """Tables on the device, which kernels in flight may still read when it is full."""

    def make_room(self, most: int) -> None:
        if len(self) >= most:
            if not INTERPRETED:
                torch.cuda.synchronize()
            self.clear()


@dataclass(frozen=True, eq=False)
class _Layout:
    """What shapes, dtypes and device alone determine of a call.

    Attributes:
        numels: sizes of all tensors in the order of the call.
        integers: size, first chunk and number of chunks of each tensor, int64 ``(m, 3)``.
        constants: see :func:`~learned_optim.kernels._checks.constants_of`, float64 ``(m, 3)``.
        chunk_tensor: the tensor that a chunk belongs to, int32 ``(chunks,)``.
        bytes: sizes in memory of parameter, gradient, the three moments, statistics, step and
            update of each tensor, int64 ``(m, 8)``, on the CPU.
        types: of parameters and moments.
    """

    numels: list[int]
    integers: Tensor
    constants: Tensor
    chunk_tensor: Tensor
    bytes: Tensor
    types: tuple[torch.dtype, torch.dtype]


_layouts = _Cache[_Layout]()
_tables = _Cache[tuple[Tensor, bool] | None]()
_captured: list[_Layout] = []  # graphs read their tables for as long as they are replayed


def step_(tensors: StepTensors, settings: StepSettings) -> bool:
    """See :func:`learned_optim.kernels.step_`.

    Parameters of several dtypes take two launches for each.
    """
    from learned_optim.kernels import _trial  # it runs what is here

    kernels, _ = loaded()
    if kernels is None or not _takes_lr(settings.lr, tensors.params[0].device):
        return False
    calls = []
    for chosen in _by_types(tensors.params, tensors.states):
        call = prepare(_subset(tensors, chosen))
        if call is None or not _trial.passed(kernels, call):
            return False
        calls.append(call)
    for index, call in enumerate(calls):
        try:
            launch(kernels, call, settings)
        except Exception as error:  # of the compiler: nothing was launched
            if index:
                raise
            fail(f"{type(error).__name__}: {error}")
            return False
    _checks.increment_versions(tensors.params)
    return True


def _takes_lr(lr: float | Tensor, device: torch.device) -> bool:
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return True
    return lr.device == device and lr.numel() == 1 and lr.is_floating_point() and type(lr) is Tensor


def _by_types(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
) -> Iterable[list[int]]:
    """Indices of parameters whose dtypes, and whose moments', are the same."""
    found: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        found.setdefault((param.dtype, state["fast"].dtype), []).append(index)
    return found.values()


def _subset(tensors: StepTensors, chosen: list[int]) -> StepTensors:
    """The call of some of the parameters."""
    network, params, grads, states, shapes, updates = tensors
    if network[1].dim() > 1:  # a network for each tensor
        network = [weight[chosen] for weight in network]
    return StepTensors(
        network,
        [params[i] for i in chosen],
        [grads[i] for i in chosen],
        [states[i] for i in chosen],
        tuple(params[i].shape if shapes is None else shapes[i] for i in chosen),
        None if updates is None else [updates[i] for i in chosen],
    )


# ---- one call


@dataclass(frozen=True)
class Call:
    """Two launches.

    Attributes:
        network: weights, see :func:`step_`.
        layout: of the tensors.
        addresses: of the tensors, int64 ``(m, 8)``, 0 where the update goes onto the parameter;
            rows on the host while a graph is captured.
        aligned: whether all addresses are multiples of 16.
    """

    network: Sequence[Tensor]
    layout: _Layout
    addresses: Tensor | list[list[int]]
    aligned: bool


def prepare(call: StepTensors) -> Call | None:
    """The launches of parameters of one dtype; ``None`` for tensors the kernels do not take."""
    network, params, grads, states, shapes, updates = call
    m, device = len(params), params[0].device
    own = zip(*map(_checks.state_entries, states), strict=True)
    tensors = [*params, *grads, *chain(*own), *network]
    addresses = _checks.addresses_of(tensors, is_here)
    if addresses is None or any(tensor.device != device for tensor in tensors):
        return None
    if any(map(Tensor.is_neg, tensors[: 2 * m])) or any(map(Tensor.is_inference, params)):
        return None
    shapes = tuple([param.shape for param in params] if shapes is None else shapes)
    capturing = not INTERPRETED and torch.cuda.is_current_stream_capturing()
    dtypes, weights = tuple(tensor.dtype for tensor in tensors), tuple(w.shape for w in network)
    key = shapes, dtypes, weights, device
    layout = _layouts.get(key)
    if layout is None:
        if capturing or not _checks.takes_dtypes(m, dtypes):
            return None
        if not _checks.takes_network(m, weights, _MOST_UNITS):
            return None
        _layouts.make_room(256)
        layout = _layouts[key] = _make_layout(shapes, dtypes, weights, device)
    if [tensor.numel() for tensor in tensors] != layout.numels:
        return None
    places = [0] * m
    for index, update in enumerate(updates or ()):
        if update is not None:
            places[index] = update.data_ptr()
    rows = [[*addresses[i : 7 * m : m], places[i]] for i in range(m)]
    if capturing:
        _captured.append(layout)
        usable, aligned = _memory(rows, layout)
        return Call(network, layout, rows, aligned) if usable else None
    stream = 0 if INTERPRETED else torch.cuda.current_stream(device).cuda_stream
    where = layout, (*addresses[: 7 * m], *places), stream
    if where not in _tables:
        _tables.make_room(1024)
        usable, aligned = _memory(rows, layout)
        _tables[where] = (_upload(_host(rows), device), aligned) if usable else None
    table = _tables[where]
    return None if table is None else Call(network, layout, *table)


def _make_layout(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    weights: tuple[torch.Size, ...],
    device: torch.device,
) -> _Layout:
    m = len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    # An empty tensor has a chunk, too, which counts its step.
    chunks = _host([max(1, -(-size // CHUNK)) for size in sizes])
    integers = torch.stack((_host(sizes), chunks.cumsum(0) - chunks, chunks), 1)
    constants = _host(_checks.constants_of(shapes), torch.float64).reshape(m, 3)
    items = [dtypes[i * m].itemsize for i in range(5)]
    per_tensor = [[*(size * item for item in items), 4 * STATS, 4, 4 * size] for size in sizes]
    layout = _Layout(
        numels=[*sizes * 5, *[STATS] * m, *[1] * m, *map(math.prod, weights)],
        integers=_upload(integers, device),
        constants=_upload(constants, device),
        chunk_tensor=_upload(_host(range(m), torch.int32).repeat_interleave(chunks), device),
        bytes=_host(per_tensor),
        types=(dtypes[0], dtypes[2 * m]),
    )
    if not INTERPRETED:  # other streams will read it
        torch.cuda.current_stream(device).synchronize()
    return layout


def _host(values: Sequence[Any] | range, dtype: torch.dtype = torch.int64) -> Tensor:
    """On the CPU, whatever the default device."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _memory(rows: list[list[int]], layout: _Layout) -> tuple[bool, bool]:
    """Whether memory is aligned and nothing written is read elsewhere; aligned to 16 bytes."""
    begin = _host(rows)
    end = begin + layout.bytes
    param, state = (dtype.itemsize for dtype in layout.types)
    unit = _host([param, param, state, state, state, 4, 4, 4])
    used = layout.bytes > 0
    used[:, 7] &= begin[:, 7] != 0
    if bool(((begin % unit != 0) | (begin == 0))[used].any()):
        return False, False
    written = _host([1, 0, 1, 1, 1, 1, 1, 1], torch.bool).expand_as(used)[used]
    order = begin[used].argsort()
    begins, ends, written = begin[used][order], end[used][order], written[order]
    if len(order) > 1:
        before = ends.cummax(0).values[:-1]
        before_written = torch.where(written, ends, 0).cummax(0).values[:-1]
        overlap = (begins[1:] < before_written) | (written[1:] & (begins[1:] < before))
        if bool(overlap.any()):
            return False, False
    vectors = [0, 1, 2, 3, 4, 7]
    return True, not bool((begin[:, vectors][used[:, vectors]] % 16).any())


def launch(kernels: ModuleType, call: Call, settings: StepSettings) -> None:
    """Two launches: the gains of all tensors, then the update of all coordinates."""
    lr, weight_decay, maximize, warmup, total_steps = settings
    layout = call.layout
    m, chunks, device = len(layout.integers), len(layout.chunk_tensor), layout.integers.device
    on_device = isinstance(lr, Tensor) and (lr.device.type != "cpu" or INTERPRETED)
    with _on(device):
        addresses = call.addresses
        if isinstance(addresses, list):
            rows, addresses = addresses, torch.empty((m, 8), dtype=torch.int64, device=device)
            for index, row in enumerate(rows):
                kernels.addresses_kernel[(1,)](addresses, index, *row)
        gains = torch.empty((m, _ROW), dtype=torch.float64, device=device)
        counters = torch.empty(m, dtype=torch.int32, device=device)
        sums = torch.empty((chunks, _ROW), dtype=torch.float32, device=device)
        kernels.gains_kernel[(m,)](
            addresses, layout.integers, layout.constants, *call.network,
            lr if on_device else gains, gains, counters, 0.0 if on_device else float(lr),
            DECAY_UNIT * weight_decay, float(total_steps or 0.0), float(warmup),
            PARAM_TYPE=_triton_type(layout.types[0]), UNITS=call.network[1].shape[-1],
            OWN_NETWORKS=call.network[1].dim() - 1, LR_ON_DEVICE=on_device, BLOCK=_MEASURE_BLOCK,
        )  # fmt: skip
        kernels.update_kernel[(chunks,)](
            addresses, layout.integers, layout.chunk_tensor, gains, counters, sums,
            -1.0 if maximize else 1.0, KNOWN=bool(total_steps),
            PARAM_TYPE=_triton_type(layout.types[0]), STATE_TYPE=_triton_type(layout.types[1]),
            CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=call.aligned,
        )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
