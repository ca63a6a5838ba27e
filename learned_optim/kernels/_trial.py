"""The Triton kernels on a small problem, against the CPU's kernel, before they are trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from learned_optim.kernels import _cpu, _library, triton_step
from learned_optim.kernels._call import StepSettings, StepTensors

_passed: dict[Hashable, bool] = {}
#: Deviations from the CPU's kernel allowed in a trial: rounding, of half types for the most part.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


def passed(kernels: ModuleType, call: triton_step.Call) -> bool:
    """True if calls of these dtypes and this network agree with the CPU's kernel; tried once."""
    network, device, types = call.network, call.layout.integers.device, call.layout.types
    key = device, types, network[1].shape, network[0].shape[-1]
    if key not in _passed:
        if not triton_step.INTERPRETED and torch.cuda.is_current_stream_capturing():
            return False
        _passed[key] = False
        try:
            with torch.no_grad():
                _try(kernels, network, device, types)
            _passed[key] = True
        except Exception as error:  # whatever a compiler may raise
            triton_step.fail(f"{type(error).__name__}: {error}")
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
    shapes = (torch.Size((triton_step.CHUNK + 37,)), torch.Size((5, 7)))

    def draw(scale: float) -> list[Tensor]:
        return [
            (scale * torch.randn(s, generator=generator, device="cpu")).to(types[0]) for s in shapes
        ]

    host, on_host = draw(0.1), [_fresh_state(shape, types[1]) for shape in shapes]
    own = [param.to(device, copy=True) for param in host]
    on_device = [{k: v.to(device, copy=True) for k, v in state.items()} for state in on_host]
    options = StepSettings(lr=1.0, weight_decay=1000.0, warmup=2, total_steps=9.0)
    compared = _library.loaded()[0] is not None  # without a warning: it is optional here
    # The second tensor is a rotated matrix, whose update goes elsewhere.
    apart = [torch.zeros(shapes[1], device="cpu"), torch.zeros(shapes[1], device=device)]
    for _ in range(3):
        grads = draw(1.0)
        moved = [grad.to(device) for grad in grads]
        tensors = StepTensors(network, own, moved, on_device, shapes, (None, apart[1]))
        call = triton_step.prepare(tensors)
        if call is None:
            raise ArithmeticError("the trial's tensors were refused")
        triton_step.launch(kernels, call, options)
        weights = [weight.to("cpu") for weight in network]
        compared = compared and _cpu.step_(
            StepTensors(weights, host, grads, on_host, shapes, (None, apart[0])), options
        )
    tolerance = _TOLERANCE.get(types[0], 5e-2)
    tolerance = tolerance if types[1] is torch.float32 else max(tolerance, 5e-2)
    pairs = [*zip(host, own, strict=True), (apart[0], apart[1])]
    for state, device_state in zip(on_host, on_device, strict=True):
        pairs += [(state[key], device_state[key]) for key in state]
    for want, got in pairs:
        got = got.to("cpu")
        unit = want.double().abs().clamp(min=1)
        worst = float(((got.double() - want.double()) / unit).abs().max()) if compared else 0.0
        if not (bool(got.isfinite().all()) and worst <= tolerance):
            raise ArithmeticError(f"a trial step went wrong by {worst:.2g}")


def _fresh_state(shape: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, like = ("fast", "slow", "square"), torch.zeros((*shape, 1), dtype=dtype, device="cpu")
    own = {"stats": (triton_step.STATS,), "step": ()}
    return {
        **{key: like.clone() for key in keys},
        **{key: torch.zeros(size, device="cpu") for key, size in own.items()},
    }
