"""Compiled steps, of the rule ``horizon`` and of stacks of LSTM layers.

The CPU has a library with a plain C interface, called through ctypes. Installing the package builds
it if there is a C++ compiler. GPUs have Triton kernels for ``horizon``; CUDA builds of torch bring
Triton. Where kernels are missing or refuse tensors, callers use the pure form, which they equal up
to rounding. ``status()`` says whether they are used; ``LEARNED_OPTIM_KERNELS=0`` in the environment
switches them off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learned_optim.kernels import _cpu, _gpu, _library, _operator
from learned_optim.kernels._cpu import (
    BoundStep,
    StepCall,
    StepSettings,
    are_plain,
    lstm_step_,
    under_a_mode,
)

__all__ = [
    "BoundStep",
    "StepSettings",
    "are_plain",
    "bind",
    "lstm_step_",
    "status",
    "step_",
    "under_a_mode",
]


def status(device_type: str = "cpu") -> str:
    """Whether the kernel for ``"cpu"`` or ``"cuda"`` tensors is used and, if not, why not."""
    if device_type == "cpu":
        return _library.loaded()[1]
    if device_type == "cuda":
        return _gpu.loaded()[1]
    return f"missing: no kernel for {device_type!r}"


def step_(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    settings: StepSettings,
    updates: Sequence[Tensor | None] | None = None,
) -> bool:
    """One step of all tensors in place; false, and nothing done, if no kernel takes them.

    Args:
        network: float32; weight and bias of the hidden layer, ``(u, 23)`` and ``(u,)``, of the
            readout, ``(5, u)`` and ``(5,)``, and the direct weight, ``(5, 23)``. Each with a
            leading ``m`` gives every tensor a network of its own.
        params: ``m`` contiguous tensors on the CPU or a GPU, float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes and sizes.
        states: ``fast``, ``slow`` and ``square``, float32 or bfloat16, of the parameters' sizes;
            ``stats``, ``(14,)``, and ``step``, ``()``, float32.
        settings: numbers of the step. A learning rate on the GPU is not read back; at 0 nothing
            changes.
        updates: contiguous float32 tensors of the parameters' sizes for the updates of rotated
            matrices, whose parameters then only decay; ``None`` for other tensors.

    Raises:
        ValueError: there are not as many gradients or states as parameters.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and under_a_mode():
        return False
    m, total_steps = len(params), settings.total_steps
    if m == 0:
        return True
    if isinstance(total_steps, Tensor) or not (total_steps is None or 0 < total_steps < math.inf):
        return False
    if len(grads) != m or len(states) != m:
        raise ValueError(
            f"a step takes a gradient and a state of each parameter, got {m} parameters, "
            f"{len(grads)} gradients and {len(states)} states"
        )
    # No warning on devices without a kernel: it is optional there.
    if compiling:
        kernel = _operator.step_
    elif params[0].is_cpu:
        kernel = _cpu.step_
    elif params[0].is_cuda:
        kernel = _gpu.step_
    else:
        return False
    return kernel(StepCall(network, params, grads, states, settings, updates))


def bind(
    network: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
) -> BoundStep | None:
    """:func:`step_` of these tensors, for many steps; ``None`` if refused, or not on the CPU.

    A bound step checks parameters and gradients in full, and the addresses of states and weights.
    The caller makes sure that states and weights are the same tensors.
    """
    if not params or not params[0].is_cpu or torch.compiler.is_compiling() or under_a_mode():
        return None
    return _cpu.bind(network, params, states)
