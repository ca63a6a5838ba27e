"""Tasks re-parametrised tensor by tensor, as an option of any family."""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor

from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks._base import Batch, Params, Task, TaskFamily


class RescaledTask(Task):
    """A task whose tensors are stored divided by positive factors, log-uniform in exp([-s, s]).

    The function is the same and its gradients are not: what a rule learns must not hang on the
    units in which a tensor is written (Wichrowska et al. 2017, section 3.4).

    Args:
        task: in its own units.
        spread: s.
        generator: draws the factors.

    Attributes:
        scales: the factors, by parameter, each of shape ``()``.
    """

    def __init__(self, task: Task, spread: float, generator: Generator) -> None:
        self.task = task
        names = list(task.separate().init(seeded("names")))
        draws = spread * (2.0 * torch.rand(len(names), generator=generator) - 1.0)
        self.scales = dict(zip(names, draws.exp().unbind(), strict=True))

    def init(self, generator: Generator) -> Params:
        params = self.task.init(generator)
        return {name: value / self.scales[name].to(value.dtype) for name, value in params.items()}

    def batch(self, generator: Generator) -> Batch:
        # Tasks side by side share one loss function: what tells them apart is in their batches.
        return (*self.scales.values(), *self.task.batch(generator))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        count = len(self.scales)
        scaled = zip(params.items(), batch[:count], strict=True)
        return self.task.loss({name: p * scale for (name, p), scale in scaled}, batch[count:])

    def test(self, params: Params) -> dict[str, float]:
        return self.task.test({name: p * self.scales[name] for name, p in params.items()})

    def separate(self) -> RescaledTask:
        other = copy.copy(self)
        other.task = self.task.separate()
        return other

    def buffers(self) -> Params:
        return self.task.buffers()

    def load_buffers(self, buffers: Params) -> None:
        self.task.load_buffers(buffers)


class Rescaled(TaskFamily):
    """A family of which every task is a :class:`RescaledTask`.

    Args:
        family: whose tasks.
        spread: s of the factors exp([-s, s]).
    """

    def __init__(self, family: TaskFamily, spread: float) -> None:
        self.family, self.spread = family, spread
        self.stackable, self.alone_because = family.stackable, family.alone_because
        self.data_sets, self.halved = family.data_sets, family.halved

    def sample(self, generator: Generator) -> Task:
        return RescaledTask(self.family.sample(generator), self.spread, generator)
