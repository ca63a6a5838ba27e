"""Dispatches a step to the kernel of its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from learned_optim.kernels import _checks, _cpu, _operator, triton_step
from learned_optim.kernels._call import StepSettings, StepTensors, is_horizon


def step_(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    config: Sequence[float],
    lr: float | Tensor = 1.0,
    lr_scales: Sequence[float] | None = None,
    decay: float = 0.0,
    maximize: bool = False,
    warmup: int = 0,
    total_steps: float | None = None,
    shapes: Sequence[torch.Size] | None = None,
    updates: Sequence[Tensor | None] | None = None,
) -> bool:
    """One step of all tensors in place; false, and nothing done, where no kernel can.

    Args:
        network: float32; weight and bias of the hidden layer, ``(u, i)`` and ``(u,)``, of the
            readout, ``(5, u)`` and ``(5,)``, and the direct weight, ``(5, i)``, with 21 or 22
            inputs ``i``. Each with a leading ``m`` gives every tensor a network of its own.
        params: ``m`` contiguous tensors on the CPU or a GPU, float32, float64, bfloat16 or float16.
        grads: of the parameters' dtypes and sizes.
        states: ``fast``, ``slow`` and ``square``, float32 or bfloat16, of the parameters' sizes;
            ``stats``, ``(14,)``, and ``step``, ``()``, float32.
        config: decays of the fast and the slow momentum and of the mean square, base step, largest
            scale and smallest share of it, warm-up share and warm-up steps of the rule's schedule,
            start and gain of the trust, later gains in runs of unknown and known length, the margin
            in the latter, what it loses there where gradients grow, the power of the schedule that
            weight decay follows, whether it spares coordinates whose gradient is zero, and the
            power of width over height by which tall matrices that start at zero step less.
        lr: multiplier of the updates; one on the GPU is not read back, and where it is 0 nothing
            changes.
        lr_scales: further multiplier of each tensor.
        decay: ``param *= 1 - decay * lr * schedule^power * trust`` before the update, with the
            rule's own schedule.
        maximize: negate the gradients.
        warmup: updates are multiplied by ``min(1, (step + 1) / warmup)``.
        total_steps: length of the run; ``None`` if it is unknown.
        shapes: of the parameters, if they are flattened.
        updates: float32 tensors for the updates of some parameters, which then only decay.

    Raises:
        ValueError: there are not as many gradients or states as parameters.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _checks.under_a_mode():
        return False
    m = len(params)
    if m == 0:
        return True
    if not is_horizon(total_steps):
        return False
    if len(grads) != m or len(states) != m:
        raise ValueError(f"{m} parameters need as many gradients and states")
    # On devices without a kernel nobody misses one, and nothing is said of it.
    if compiling:
        kernel = _operator.step_
    elif params[0].is_cpu:
        kernel = _cpu.step_
    elif params[0].is_cuda:
        kernel = triton_step.step_
    else:
        return False
    return kernel(
        StepTensors(network, params, grads, states, shapes, lr_scales, updates),
        StepSettings(config, lr, decay, maximize, warmup, total_steps or 0.0),
    )


def bind(
    network: Sequence[Tensor],
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    config: Sequence[float],
) -> Callable[..., bool] | None:
    """:func:`step_` of these tensors, for many steps; ``None`` where it refuses them, or on a GPU.

    Arguments are those of :func:`step_`.

    Returns:
        ``step(grads, lr, decay, maximize, warmup, total_steps)``, which returns what :func:`step_`
        does. It checks parameters and gradients again. Of states and weights it checks the
        addresses alone: the caller makes sure that they are the same tensors.
    """
    if torch.compiler.is_compiling() or _checks.under_a_mode():
        return None
    if not params or not params[0].is_cpu:
        return None
    bound = _cpu.bind(StepTensors(network, params, (), states), config[4])
    if bound is None:
        return None

    def step(
        grads: Sequence[Tensor],
        lr: float | Tensor,
        decay: float,
        maximize: bool,
        warmup: int,
        total_steps: float | None,
    ) -> bool:
        if _checks.under_a_mode() or not is_horizon(total_steps):
            return False
        return bound.run(
            grads, StepSettings(config, lr, decay, maximize, warmup, total_steps or 0.0)
        )

    return step
