"""Checks of tasks, before hours of meta-training are spent on them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.meta.rollout import floating
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import (
    Batch,
    Params,
    Task,
    TaskFamily,
    TaskMixture,
    obstacle_to_stacking,
)


def check_family(family: TaskFamily, name: str) -> None:
    """Try a step of two tasks of a family, or of every member of a mixture.

    Raises:
        ValueError: a task without parameters, a source without batches, batches that are no tuples
            of tensors, a loss that fails, is no finite scalar or does not depend on the parameters,
            one that keeps state from one optimizee to the next, or a stackable family whose loss
            does not run under ``vmap``.
    """
    if isinstance(family, TaskMixture):
        for member, tasks in family.members.items():
            check_family(tasks, member)
        return
    for index in range(2):
        task = family.sample(seeded("check", index))
        alone = task.separate()
        params, batch = _parameters(alone, name), _batch(alone, name)
        _check_gradients(_loss(alone, params, batch, name), params, name, all_used=True)
        _check_state(alone, batch, name)
        obstacle = obstacle_to_stacking(task) if family.stackable else None
        if obstacle is not None:
            raise ValueError(
                f"task {name!r}: optimizees cannot be computed side by side ({obstacle}), as with "
                f"batch norm that tracks statistics, dropout or batches of changing shapes: set "
                f"stackable=False"
            )


def check_finite(task: Task, name: str) -> None:
    """Check the first gradient of a task that only evaluates.

    Unlike under :func:`check_family`, the loss may leave parameters unused, keep state, or draw at
    random.

    Raises:
        ValueError: the loss cannot be computed or is no finite scalar, or a gradient is not finite.
    """
    generator = seeded("check", name)
    params = {key: value.requires_grad_() for key, value in task.init(generator).items()}
    loss = _loss(task, params, task.batch(generator), name)
    _check_gradients(loss, params, name, all_used=False)


def check_picklable(tasks: object, workers: int) -> None:
    """Raise ``ValueError`` for tasks that cannot be sent to other processes."""
    try:
        pickle.dumps(tasks)
    except Exception as error:  # whatever an object of the user's raises
        raise ValueError(
            f"workers={workers} need tasks that can be sent to other processes, and these cannot "
            f"({error}): define functions and classes at the top of a module, or set workers=1"
        ) from error


def _parameters(task: Task, name: str) -> Params:
    params = task.init(seeded("check", "parameters"))
    if not params:
        raise ValueError(
            f"task {name!r} has no parameters to optimize: init() returned {params!r}. Parameters "
            f"with requires_grad=False do not count"
        )
    for key, value in params.items():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"task {name!r}: parameter {key!r} is a {kind}, and parameters are floating tensors"
            )
        if value.device.type != "cpu":
            raise ValueError(
                f"task {name!r}: parameter {key!r} is on {value.device}, and meta-training "
                f"computes on the CPU: let init(), or the module of a ModuleTask, stay there"
            )
    # Optimizees are trained in float32.
    return {key: value.detach().float().requires_grad_() for key, value in params.items()}


def _batch(task: Task, name: str) -> Batch:
    try:
        batch = task.batch(seeded("check", "batches"))
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    if not isinstance(batch, (tuple, list)) or not all(isinstance(x, Tensor) for x in batch):
        if isinstance(batch, dict):
            kind = f"a dict with {', '.join(map(repr, batch))}: return tuple(batch.values())"
        elif isinstance(batch, (tuple, list)):
            kind = f"({', '.join(type(x).__name__ for x in batch)})"
        else:
            kind = f"a {type(batch).__name__}: return (x,) for a single tensor"
        raise ValueError(f"task {name!r}: a batch must be a tuple of tensors, and is {kind}")
    return floating(tuple(batch))


def _loss(task: Task, params: Params, batch: Batch, name: str) -> Tensor:
    try:
        with torch.enable_grad(), global_generator_seeded("check", "forward"):
            loss = task.loss(params, batch)
    except Exception as error:  # whatever a loss of the user's raises
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"task {name!r}: the loss cannot be computed: {cause}") from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"task {name!r}: the loss must be a tensor of shape (), and is a "
            f"{type(loss).__name__}, through which no gradient flows"
        )
    if loss.dim():
        raise ValueError(
            f"task {name!r}: the loss must be a single number, of shape (), and has shape "
            f"{tuple(loss.shape)}: average over the batch, as reduction='mean' does"
        )
    if not torch.isfinite(loss):
        raise ValueError(
            f"task {name!r}: the loss is {loss.item()} at the initial parameters, where no "
            f"optimizer can begin: look for a logarithm or a division of zero, or for data or "
            f"initial values that are too large"
        )
    return loss


def _check_gradients(loss: Tensor, params: Params, name: str, all_used: bool) -> None:
    grads: Sequence[Tensor | None] = [None] * len(params)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    unused = [key for key, grad in zip(params, grads, strict=True) if grad is None]
    if all_used and len(unused) == len(params):
        raise ValueError(
            f"task {name!r}: the loss does not depend on the parameters: it must be computed from "
            f"those that loss() is given, without detach(), item() or torch.no_grad()"
        )
    if all_used and unused:
        raise ValueError(
            f"task {name!r}: the loss does not use the parameters {', '.join(unused)}: leave them "
            f"out of init(), or freeze them with requires_grad_(False)"
        )
    for key, grad in zip(params, grads, strict=True):
        if grad is not None and not torch.isfinite(grad).all():
            raise ValueError(
                f"task {name!r}: the gradient of {key!r} is not finite at the initial parameters, "
                f"where no optimizer can begin"
            )


def _check_state(task: Task, batch: Batch, name: str) -> None:
    """Two losses from one initialization, computed twice, must agree."""

    def twice() -> list[float]:
        params = _parameters(task, name)
        return [_loss(task, params, batch, name).item() for _ in range(2)]

    first, second = twice(), twice()
    if first != second:
        raise ValueError(
            f"task {name!r}: the loss keeps state that init() does not reset (twice the same "
            f"computation: {first} and {second}), so figures would depend on what ran before: "
            f"keep such state in buffers of a ModuleTask, or reset it in init()"
        )
