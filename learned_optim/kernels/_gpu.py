"""The step of tensors on a GPU, by Triton kernels that have passed a trial.

Compilers and drivers differ. So each kind of call first runs on a small problem, whose result is
compared with the CPU's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from learned_optim._warn import warn
from learned_optim.kernels import _build, _cpu, _launch, _library
from learned_optim.kernels import constants as c

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
        launches = _launch.prepare(part)
        if launches is None or not _has_passed(kernels, launches):
            return False
        prepared.append(launches)
    for index, launches in enumerate(prepared):
        try:
            _launch.launch(kernels, launches, call.settings)
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
    """The parts of a call whose parameters, and their moments, have the same dtypes."""
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


def _has_passed(kernels: ModuleType, launches: _launch.Launches) -> bool:
    """True if the trial of launches of this kind, run once, agrees with the CPU's kernel."""
    network, layout = launches.network, launches.layout
    device, types = layout.integers.device, layout.types
    key = device, types, network[1].shape, network[0].shape[-1]
    if key not in _passed:
        if not _launch.INTERPRETED and torch.cuda.is_current_stream_capturing():
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
    shapes = (torch.Size((_launch.CHUNK + 37,)), torch.Size((5, 7)))

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
        launches = _launch.prepare(call)
        if launches is None:
            raise ArithmeticError("the trial's tensors were refused")
        _launch.launch(kernels, launches, options)
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
