"""Where evolution strategies' runs come from: mixtures of populations, or any task family.

A population's loss is written for many copies at once. That of any other task is computed under
``vmap``, or copy after copy where that fails, as it does with batch norm and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations import MIXTURES, Batch, Draw, Params, Population, draw
from learned_optim.meta.populations._mixture import UNKNOWN_SHARE
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import (
    GIVEN,
    ModuleTask,
    Task,
    TaskFamily,
    TaskOptions,
    build_tasks,
    obstacle_to_stacking,
)


class TaskPopulation(Population):
    """Copies of one optimizee of a task, which differ in the rule's weights alone.

    All copies see the same batches, and the same random numbers in their forward passes. Buffers,
    such as batch norm's statistics, are each copy's own.

    Args:
        task: the task.
        stacked: whether its loss runs under ``vmap``.
    """

    def __init__(self, task: Task, stacked: bool) -> None:
        self._task, self._stacked = task.separate(), stacked
        self._copies: list[Task] = []
        self._step, self._seed = 0, 0

    @property
    def name(self) -> str:
        task = self._task
        return type(task.module if isinstance(task, ModuleTask) else task).__name__

    def reset(self) -> None:
        self._copies, self._step = [], 0

    def init(self, generator: Generator) -> Params:
        self._seed = generator.initial_seed()
        initial = self._task.init(generator)
        return {name: value.detach().float() for name, value in initial.items()}

    def batch(self, generator: Generator) -> Batch:
        drawn = self._task.batch(generator)
        return tuple(part.float() if part.is_floating_point() else part for part in drawn)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        if self._stacked:
            losses: Tensor = torch.vmap(self._task.loss, in_dims=(0, None))(params, batch)
            return losses
        copies = len(next(iter(params.values())))
        while len(self._copies) < copies:
            self._copies.append(self._task.separate())
        self._step += 1
        return torch.stack([
            self._loss_of(task, {name: value[index] for name, value in params.items()}, batch)
            for index, task in enumerate(self._copies[:copies])
        ])  # fmt: skip

    def _loss_of(self, task: Task, params: Params, batch: Batch) -> Tensor:
        # Clones, because forward passes update buffers in place.
        task.load_buffers({name: buffer.clone() for name, buffer in task.buffers().items()})
        with global_generator_seeded("forward", self._seed, self._step):
            return task.loss(params, batch)


_given: TaskFamily | None = None  # of this process


@contextmanager
def given_family(family: TaskFamily | None) -> Iterator[None]:
    """Inside, the family that was handed over in Python, which has no name to be built from."""
    before = _given
    set_given_family(family)
    try:
        yield
    finally:
        set_given_family(before)


def set_given_family(family: TaskFamily | None) -> None:
    """:func:`given_family` for the life of a worker process.

    It is sent to each worker once, because its data may be large, rather than with every job.
    """
    global _given
    _given = family


@dataclass(frozen=True)
class RunSource:
    """What the runs of a training are drawn from; the same seed gives the same run.

    Attributes:
        task: a key of :data:`~learned_optim.meta.populations.MIXTURES`, the name of a task family,
            or that of the family that :func:`given_family` has.
        horizon: inner steps of a run; ``None`` for mixtures, which draw them.
        shortest: if given, lengths are log-uniform between it and ``horizon``.
        data: where images are looked for.
    """

    task: str
    horizon: int | None
    shortest: int | None
    data: DataOptions

    @classmethod
    def of(cls, recipe: EvolutionRecipe, data: DataOptions) -> RunSource:
        """That of a recipe."""
        return cls(recipe.task, recipe.horizon, recipe.shortest_horizon, data)

    @property
    def is_mixture(self) -> bool:
        """Whether populations are drawn."""
        return self.task in MIXTURES

    @property
    def longest_run(self) -> int:
        """Inner steps of the longest runs."""
        if self.horizon is not None:
            return self.horizon
        return max(family.longest_run for family in MIXTURES[self.task])

    @property
    def horizons(self) -> str:
        """The lengths of runs, such as ``100`` or ``50 to 200``."""
        return f"{self.shortest} to {self.horizon}" if self.shortest else str(self.horizon)

    def draw(self, seed: int, large: bool = False) -> Draw:
        """The run of a seed in training.

        Args:
            seed: of the run.
            large: take sizes from the upper part of their ranges, of mixtures.
        """
        if self.is_mixture:
            return draw(seed, self.data, self.task, large=large)
        return self._draw(seed)

    def draw_validation(self, seed: int, shortest: int) -> Draw:
        """The run of a seed in validation; those of a mixture have ``shortest`` steps at least."""
        if self.is_mixture:
            return draw(seed, self.data, self.task, shortest=shortest)
        return self._draw(seed)

    def family(self) -> TaskFamily:
        """The task family, unless it is a mixture.

        Raises:
            ValueError: unknown task, or one that may not meta-train.
            FileNotFoundError: its data is not there.
        """
        if self.task.startswith(f"{GIVEN}:") and _given is not None:
            return _given
        return _built(self.task, self.data)

    def _draw(self, seed: int) -> Draw:
        family, generator = self.family(), seeded("evolution", self.task, seed)
        task = family.sample(generator)
        length, chance = torch.rand(2, generator=generator).tolist()
        stacked = family.stackable or obstacle_to_stacking(task) is None
        assert self.horizon is not None
        shortest = self.shortest or self.horizon
        steps = round(shortest * (self.horizon / shortest) ** length)
        return Draw(TaskPopulation(task, stacked), steps, known=chance >= UNKNOWN_SHARE)


@lru_cache(maxsize=4)
def _built(task: str, data: DataOptions) -> TaskFamily:
    return build_tasks(task, TaskOptions("meta", data))
