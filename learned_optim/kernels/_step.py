"""Dispatches a step to the kernel of its device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learned_optim.kernels import _checks, _cpu, _operator, triton_step
from learned_optim.kernels._call import StepSettings, StepTensors, is_horizon


def step_(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    settings: StepSettings,
    shapes: Sequence[torch.Size] | None = None,
    updates: Sequence[Tensor | None] | None = None,
) -> bool:
    """One step of all tensors in place; false, and nothing done, where no kernel can.

    Args:
        network: float32; weight and bias of the hidden layer, ``(u, 23)`` and ``(u,)``, of the
            readout, ``(5, u)`` and ``(5,)``, and the direct weight, ``(5, 23)``. Each with a
            leading ``m`` gives every tensor a network of its own.
        params: ``m`` contiguous tensors on the CPU or a GPU, float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes and sizes.
        states: ``fast``, ``slow`` and ``square``, float32 or bfloat16, of the parameters' sizes;
            ``stats``, ``(14,)``, and ``step``, ``()``, float32.
        settings: numbers of the step. A learning rate on the GPU is not read back; where it is 0
            nothing changes.
        shapes: of the parameters, if they are flattened.
        updates: contiguous float32 tensors of the parameters' sizes for the updates of rotated
            matrices, whose parameters then only decay; ``None`` for other tensors.

    Raises:
        ValueError: there are not as many gradients or states as parameters.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _checks.under_a_mode():
        return False
    m = len(params)
    if m == 0:
        return True
    if not is_horizon(settings.total_steps):
        return False
    if len(grads) != m or len(states) != m:
        raise ValueError(f"{m} parameters need as many gradients and states")
    # No warning on devices without a kernel: it is optional there.
    if compiling:
        kernel = _operator.step_
    elif params[0].is_cpu:
        kernel = _cpu.step_
    elif params[0].is_cuda:
        kernel = triton_step.step_
    else:
        return False
    return kernel(StepTensors(network, params, grads, states, shapes, updates), settings)


class BoundKernel:
    """:func:`step_` of tensors that stay the same for many steps."""

    def __init__(self, bound: _cpu.BoundStep) -> None:
        self._bound = bound

    def takes(self, settings: StepSettings) -> bool:
        """Whether a step with these settings can be run now."""
        return not _checks.under_a_mode() and is_horizon(settings.total_steps)

    def __call__(
        self,
        grads: Sequence[Tensor],
        settings: StepSettings,
        updates: Sequence[Tensor | None] | None = None,
    ) -> bool:
        """The step; false, and nothing done, as :func:`step_`.

        It checks parameters and gradients again. Of states and weights it checks the addresses
        alone: the caller makes sure that they are the same tensors.
        """
        return self.takes(settings) and self._bound.run(grads, settings, updates)


def bind(
    network: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
) -> BoundKernel | None:
    """:func:`step_` of these tensors, for many steps; ``None`` where it refuses them, or on a GPU.

    Arguments are those of :func:`step_`.
    """
    if torch.compiler.is_compiling() or _checks.under_a_mode():
        return None
    if not params or not params[0].is_cpu:
        return None
    bound = _cpu.bind(StepTensors(network, params, (), states))
    return None if bound is None else BoundKernel(bound)
