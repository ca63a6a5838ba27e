"""The step of tensors on a GPU: two launches of Triton kernels, for any number of tensors.

Compilers and drivers differ. So each kind of call first runs on a small problem, whose result is
compared with the CPU's kernel.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from learned_optim._warn import warn
from learned_optim.kernels import _build, _cpu, _library
from learned_optim.kernels import constants as c

# Coordinates of a program, and of one pass of its loop.
CHUNK, BLOCK = 4096, 512
_MEASURE_BLOCK = 1024  # coordinates of one pass of the loop that measures a new tensor
_ROW = 16  # of gains and of sums
# In the interpreter a kernel runs on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
is_here = _cpu.is_cpu if INTERPRETED else _cpu.is_cuda

_failure = ""
_passed: dict[Hashable, bool] = {}


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


def loaded() -> tuple[ModuleType | None, str]:
    """The kernels and Triton's version; or ``None`` and why they are not used."""
    if _build.switched_off():
        return None, f"off: {_build.SWITCH}=0"
    return (None, f"failed: {_failure}") if _failure else _imported()


def _fail(error: Exception) -> None:
    """Switch the kernels off for this process, and warn once."""
    global _failure
    if not _failure:
        _failure = f"{type(error).__name__}: {error}"
        warn(
            f"learned_optim runs without its Triton kernels, several times slower ({_failure}). "
            f"{_build.SWITCH}=0 silences this.",
            RuntimeWarning,
        )


def step_(call: _cpu.StepCall) -> bool:
    """See :func:`learned_optim.kernels.step_`.

    Each pair of dtypes, of parameters and of moments, takes two launches.
    """
    kernels, _ = loaded()
    if kernels is None or not _takes_lr(call.settings.lr, call.params[0].device):
        return False
    prepared = []
    for part in _by_types(call):
        launches = prepare(part)
        if launches is None or not _has_passed(kernels, launches):
            return False
        prepared.append(launches)
    for index, launches in enumerate(prepared):
        try:
            launch(kernels, launches, call.settings)
        except Exception as error:  # of the compiler: nothing was launched
            if index:
                raise
            _fail(error)
            return False
    _cpu.increment_versions(call.params)
    return True


def _takes_lr(lr: float | Tensor, device: torch.device) -> bool:
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return True
    return lr.device == device and lr.numel() == 1 and lr.is_floating_point() and type(lr) is Tensor


def _by_types(call: _cpu.StepCall) -> Iterator[_cpu.StepCall]:
    """Parts of a call: parameters of one dtype with moments of one dtype."""
    found: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, (param, state) in enumerate(zip(call.params, call.states, strict=True)):
        found.setdefault((param.dtype, state["fast"].dtype), []).append(index)
    network, updates = call.network, call.updates
    for chosen in found.values():
        yield _cpu.StepCall(
            [weight[chosen] for weight in network] if network[1].dim() > 1 else network,
            [call.params[i] for i in chosen],
            [call.grads[i] for i in chosen],
            [call.states[i] for i in chosen],
            call.settings,
            None if updates is None else [updates[i] for i in chosen],
        )


# ---- the trial


def _has_passed(kernels: ModuleType, launches: Launches) -> bool:
    """True if a trial of this kind, run once, agrees with the CPU's kernel."""
    network, layout = launches.network, launches.layout
    device, types = layout.integers.device, layout.types
    key = device, types, network[1].shape, network[0].shape[-1]
    if key not in _passed:
        if not INTERPRETED and torch.cuda.is_current_stream_capturing():
            return False
        _passed[key] = False
        try:
            with torch.no_grad():
                _try(kernels, network, device, types)
            _passed[key] = True
        except Exception as error:  # whatever a compiler may raise
            _fail(error)
    return _passed[key]


def _try(
    kernels: ModuleType,
    network: Sequence[Tensor],
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype],
) -> None:
    """Three steps of two tensors, by the kernels and, where it is compiled, by the CPU's.

    Raises:
        Exception: the compiler's.
        ArithmeticError: the results differ or are not finite.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    network = [weight.detach() for weight in network]
    if network[1].dim() > 1:
        network = [weight[:1].expand(2, *weight.shape[1:]).contiguous() for weight in network]
    shapes = (torch.Size((CHUNK + 37,)), torch.Size((5, 7)))

    def draw(scale: float) -> list[Tensor]:
        return [
            (scale * torch.randn(s, generator=generator, device="cpu")).to(types[0]) for s in shapes
        ]

    host, on_host = draw(0.1), [_fresh_state(shape, types[1]) for shape in shapes]
    own = [param.to(device, copy=True) for param in host]
    on_device = [{k: v.to(device, copy=True) for k, v in state.items()} for state in on_host]
    options = _cpu.StepSettings(lr=1.0, weight_decay=1000.0, warmup=2, total_steps=9.0)
    compared = _library.loaded()[0] is not None  # without a warning: it is optional here
    # The second tensor is a rotated matrix, whose update goes elsewhere.
    apart = [torch.zeros(shapes[1], device="cpu"), torch.zeros(shapes[1], device=device)]
    for _ in range(3):
        grads = draw(1.0)
        moved = [grad.to(device) for grad in grads]
        call = _cpu.StepCall(network, own, moved, on_device, options, (None, apart[1]))
        launches = prepare(call)
        if launches is None:
            raise ArithmeticError("the trial's tensors were refused")
        launch(kernels, launches, options)
        weights = [weight.to("cpu") for weight in network]
        call = _cpu.StepCall(weights, host, grads, on_host, options, (None, apart[0]))
        compared = compared and _cpu.step_(call)
    # Rounding, which is coarse where parameters or moments are of half precision.
    tolerance = 5e-2 if {torch.bfloat16, torch.float16} & {*types} else 1e-4
    pairs = [*zip(host, own, strict=True), (apart[0], apart[1])]
    for state, device_state in zip(on_host, on_device, strict=True):
        pairs += zip(state.values(), device_state.values(), strict=True)
    for want, got in pairs:
        got = got.to("cpu")
        unit = want.double().abs().clamp(min=1)
        worst = float(((got.double() - want.double()) / unit).abs().max()) if compared else 0.0
        if not (bool(got.isfinite().all()) and worst <= tolerance):
            raise ArithmeticError(f"a trial step went wrong by {worst:.2g}")


def _fresh_state(shape: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
    moments = {key: torch.zeros((*shape, 1), dtype=dtype, device="cpu") for key in _cpu.MOMENTS}
    stats, step = torch.zeros(c.NUM_STATS, device="cpu"), torch.zeros((), device="cpu")
    return {**moments, "stats": stats, "step": step}


# ---- the launches


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
    """Empty a full cache, once no running kernel reads its tables."""
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
        if capturing or not _cpu.takes(m, dtypes, weights):
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
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
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


@functools.cache
def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
