"""Two launches of the Triton kernels, for any number of tensors on a GPU."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels import _cpu
from learned_optim.kernels import constants as c

# Coordinates of a program, and of one pass of its loop.
CHUNK, BLOCK = 4096, 512
_MEASURE_BLOCK = 1024  # coordinates of one pass of the loop that measures a new tensor
_ROW = 16  # of gains and of sums
# In the interpreter a kernel runs on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
is_here = _cpu.is_cpu if INTERPRETED else _cpu.is_cuda


@dataclass(frozen=True, eq=False)
class _Layout:
    """The part of a call that shapes, dtypes and device determine.

    Attributes:
        numels: sizes of all tensors in the order of the call.
        integers: size, first chunk and number of chunks of each tensor, int64 ``(m, 3)``.
        constants: see :func:`~learned_optim.kernels._cpu.constants_of`, float64 ``(m, 3)``.
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


_layouts: dict[Hashable, _Layout] = {}
_tables: dict[Hashable, tuple[Tensor, bool] | None] = {}
_captured: list[_Layout] = []  # kept for good: a graph reads its tables at every replay


def _make_room(cache: dict[Hashable, Any], most: int) -> None:
    """Empty a full cache of tables after running kernels, which may read them, have ended."""
    if len(cache) >= most:
        if not INTERPRETED:
            torch.cuda.synchronize()
        cache.clear()


@dataclass(frozen=True)
class Launches:
    """The arguments of two launches.

    Attributes:
        network: the five weights, shared, or with a leading ``m``.
        layout: of the tensors.
        addresses: of the tensors, int64 ``(m, 8)``, 0 where the update goes onto the parameter;
            rows on the host while a graph is captured.
        aligned: whether all addresses are multiples of 16.
    """

    network: Sequence[Tensor]
    layout: _Layout
    addresses: Tensor | list[list[int]]
    aligned: bool


def prepare(call: _cpu.StepCall) -> Launches | None:
    """The launches of parameters of one dtype; ``None`` for tensors the kernels do not take."""
    network, params, grads, states, _, updates = call
    m, device = len(params), params[0].device
    own = zip(*map(_cpu.state_entries, states), strict=True)
    tensors = [*params, *grads, *chain(*own), *network]
    addresses = _cpu.addresses_of(tensors, is_here)
    if addresses is None or any(tensor.device != device for tensor in tensors):
        return None
    if any(map(Tensor.is_neg, tensors[: 2 * m])) or any(map(Tensor.is_inference, params)):
        return None
    shapes = tuple(param.shape for param in params)
    capturing = not INTERPRETED and torch.cuda.is_current_stream_capturing()
    dtypes, weights = tuple(tensor.dtype for tensor in tensors), tuple(w.shape for w in network)
    key = shapes, dtypes, weights, device
    layout = _layouts.get(key)
    if layout is None:
        if capturing or not _cpu.takes_dtypes(m, dtypes) or not _cpu.takes_network(m, weights):
            return None
        _make_room(_layouts, 256)
        layout = _layouts[key] = _make_layout(shapes, dtypes, weights, device)
    if [tensor.numel() for tensor in tensors] != layout.numels:
        return None
    places = _cpu.addresses_of_updates(updates or [None] * m, layout.numels, is_here)
    if places is None:
        return None
    rows = [[*addresses[i : 7 * m : m], places[i]] for i in range(m)]
    if capturing:
        _captured.append(layout)
        usable, aligned = _memory(rows, layout)
        return Launches(network, layout, rows, aligned) if usable else None
    stream = 0 if INTERPRETED else torch.cuda.current_stream(device).cuda_stream
    where = layout, (*addresses[: 7 * m], *places), stream
    if where not in _tables:
        _make_room(_tables, 1024)
        usable, aligned = _memory(rows, layout)
        _tables[where] = (_upload(_host(rows), device), aligned) if usable else None
    table = _tables[where]
    return None if table is None else Launches(network, layout, *table)


def _make_layout(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    weights: tuple[torch.Size, ...],
    device: torch.device,
) -> _Layout:
    m = len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    # An empty tensor also has a chunk, which counts its step.
    chunks = _host([max(1, -(-size // CHUNK)) for size in sizes])
    integers = torch.stack((_host(sizes), chunks.cumsum(0) - chunks, chunks), 1)
    constants = _host(_cpu.constants_of(shapes), torch.float64).reshape(m, 3)
    items = [dtypes[i * m].itemsize for i in range(5)]
    layout = _Layout(
        numels=[*sizes * 5, *[c.NUM_STATS] * m, *[1] * m, *map(math.prod, weights)],
        integers=_upload(integers, device),
        constants=_upload(constants, device),
        chunk_tensor=_upload(_host(range(m), torch.int32).repeat_interleave(chunks), device),
        bytes=_host([[*(n * i for i in items), 4 * c.NUM_STATS, 4, 4 * n] for n in sizes]),
        types=(dtypes[0], dtypes[2 * m]),
    )
    if not INTERPRETED:  # other streams may read it
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


def launch(kernels: ModuleType, launches: Launches, settings: _cpu.StepSettings) -> None:
    """Two launches: the gains of all tensors, then the update of all coordinates."""
    lr, total_steps = settings.lr, settings.total_steps
    layout, bias = launches.layout, launches.network[1]
    m, chunks, device = len(layout.integers), len(layout.chunk_tensor), layout.integers.device
    on_device = isinstance(lr, Tensor) and (lr.device.type != "cpu" or INTERPRETED)
    with _on(device):
        addresses = launches.addresses
        if isinstance(addresses, list):
            rows, addresses = addresses, torch.empty((m, 8), dtype=torch.int64, device=device)
            for index, row in enumerate(rows):
                kernels.addresses_kernel[(1,)](addresses, index, *row)
        gains = torch.empty((m, _ROW), dtype=torch.float64, device=device)
        counters = torch.empty(m, dtype=torch.int32, device=device)
        sums = torch.empty((chunks, _ROW), dtype=torch.float32, device=device)
        kernels.gains_kernel[(m,)](
            addresses, layout.integers, layout.constants, *launches.network,
            lr if on_device else gains, gains, counters, 0.0 if on_device else float(lr),
            c.DECAY_UNIT * settings.weight_decay, float(total_steps or 0.0), float(settings.warmup),
            PARAM_TYPE=_triton_type(layout.types[0]), UNITS=bias.shape[-1],
            OWN_NETWORKS=bias.dim() - 1, LR_ON_DEVICE=on_device, BLOCK=_MEASURE_BLOCK,
        )  # fmt: skip
        kernels.update_kernel[(chunks,)](
            addresses, layout.integers, layout.chunk_tensor, gains, counters, sums,
            -1.0 if settings.maximize else 1.0, KNOWN=bool(total_steps),
            PARAM_TYPE=_triton_type(layout.types[0]), STATE_TYPE=_triton_type(layout.types[1]),
            CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=launches.aligned,
        )  # fmt: skip


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
