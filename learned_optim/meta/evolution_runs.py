"""Whole runs of evolution strategies, in this process or in workers.

A population's loss is written for many copies at once. That of any other task is computed under
``vmap``, or copy after copy where that fails, as it does with batch norm and dropout.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from learned_optim.meta.checks import check_picklable
from learned_optim.meta.data import DataOptions
from learned_optim.meta.method import TrainingError
from learned_optim.meta.populations import ADAMW_LRS as MIXTURE_LRS
from learned_optim.meta.populations import (
    MIXTURES,
    Batch,
    Draw,
    Params,
    Population,
    draw,
    fitness,
    roll,
    roll_adamw,
    scores,
)
from learned_optim.meta.populations._mixture import SHORTEST_RUN, UNKNOWN_SHARE
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.rollout import floating
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import (
    ModuleTask,
    Task,
    TaskFamily,
    TaskOptions,
    build_tasks,
    obstacle_to_stacking,
)
from learned_optim.meta.validation import ADAMW_LRS, Reference
from learned_optim.rules import UpdateRule, rule_for

#: Seeds of the validation tasks; :func:`training_seed` skips them.
VALIDATION_SEEDS = range(10_000_000, 10_100_000)
# Least number of steps of a mixture's validation runs, unless they are too costly.
_SHORTEST_VALIDATION = 150
# Fitness differences, in log loss, are cut off at `_LARGEST_DIFFERENCE` and compressed by asinh
# beyond `_UNIT`.
_LARGEST_DIFFERENCE, _UNIT = 3.0, 0.02
# Errors of a single task or of its weights: the task is skipped and counted.
_RUN_ERRORS = (ArithmeticError, RuntimeError, ValueError)


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
        return floating(self._task.batch(generator))

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


@dataclass(frozen=True)
class TaskResult:
    """Fitness of a task's runs.

    Attributes:
        seed: of the task.
        family: kind of the task; empty if none could be drawn.
        fitness: of ``weights + perturbation`` for every pair, then of ``weights - perturbation``,
            float64 of shape ``(2 * pairs,)``; ``None`` if the run failed.
        error: cause of the failure.
    """

    seed: int
    family: str
    fitness: Tensor | None
    error: str = ""


class Runs:
    """The runs of a recipe; the same seed gives the same run.

    Args:
        recipe: tasks, rule and perturbations.
        data: where images are looked for.
        given: the tasks, if they have no registered name.

    Raises:
        ValueError: unknown task, or one that may not meta-train.
        FileNotFoundError: its data is not there.

    Attributes:
        family: the tasks; ``None`` if they are a mixture of populations.
    """

    def __init__(
        self, recipe: EvolutionRecipe, data: DataOptions, given: TaskFamily | None
    ) -> None:
        self.recipe, self.data = recipe, data
        self.family = given
        if given is None and recipe.task not in MIXTURES:
            self.family = build_tasks(recipe.task, TaskOptions("meta", data))

    @cached_property
    def _rule(self) -> UpdateRule:
        return rule_for(self.recipe.rule)

    @property
    def longest_run(self) -> int:
        """Inner steps of the longest runs."""
        if self.recipe.horizon is not None:
            return self.recipe.horizon
        return max(family.longest_run for family in MIXTURES[self.recipe.task])

    def draw(self, seed: int, large: bool = False, shortest: int = SHORTEST_RUN) -> Draw:
        """The run of a seed.

        Args:
            seed: of the run.
            large: of mixtures: take sizes from the upper part of their ranges.
            shortest: of mixtures: least number of steps.
        """
        recipe, family = self.recipe, self.family
        if family is None:
            return draw(seed, self.data, recipe.task, shortest=shortest, large=large)
        generator = seeded("evolution", recipe.task, seed)
        task = family.sample(generator)
        # The second of two draws, so that the run of a seed stays what it was.
        chance = torch.rand(2, generator=generator)[1].item()
        stacked = family.stackable or obstacle_to_stacking(task) is None
        assert recipe.horizon is not None
        return Draw(TaskPopulation(task, stacked), recipe.horizon, known=chance >= UNKNOWN_SHARE)

    def train(self, job: tuple[int, Tensor, bool]) -> TaskResult:
        """Run a task under all perturbed weights, side by side on the same batches.

        Args:
            job: seed, weights of shape ``(n,)``, and whether the task is a large one.
        """
        seed, weights, large = job
        kind, found, failure = "", None, ""
        try:
            run = self.draw(seed, large)
            kind = run.task.name
            change = perturbations(seed, self.recipe.pairs, len(weights)) * self.recipe.sigma
            weights = torch.cat((weights + change, weights - change))
            losses, held_out = roll(self._rule, weights, run, seed)
            found = fitness(losses, run.known, held_out)
        except _RUN_ERRORS as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return TaskResult(seed, kind, found, failure)

    def validate(self, job: tuple[int, Tensor]) -> float:
        """Log of the final over the first loss.

        Args:
            job: number of the validation task, and weights of shape ``(n,)``.
        """
        index, weights = job
        run, seed = self._validation_run(index)
        losses, _ = roll(self._rule, weights[None], run, seed)
        return scores(losses)[0].item()

    def reference(self, index: int) -> Reference:
        """AdamW on a validation task, at every peak learning rate."""
        run, seed = self._validation_run(index)
        rates = MIXTURE_LRS if self.family is None else ADAMW_LRS
        final = scores(roll_adamw(rates, run, seed))[0]
        return Reference(index, run.task.name, tuple(final.tolist()))

    def _validation_run(self, index: int) -> tuple[Draw, int]:
        seed = VALIDATION_SEEDS.start + index
        return self.draw(seed, shortest=_SHORTEST_VALIDATION), seed


def training_seed(number: int) -> int:
    """The seed of a training task by its number; different numbers have different seeds."""
    return number if number < VALIDATION_SEEDS.start else number + len(VALIDATION_SEEDS)


def perturbations(seed: int, pairs: int, count: int) -> Tensor:
    """Standard normal directions of a task's pairs, float32 of shape ``(pairs, count)``."""
    return torch.randn(pairs, count, generator=torch.Generator().manual_seed(seed))


def meta_gradient(
    results: Sequence[TaskResult], pairs: int, count: int
) -> tuple[Tensor, list[TaskResult]]:
    """The meta-gradient, up to its length, from the fitness of perturbed weights.

    Args:
        results: one per task.
        pairs: perturbations per task.
        count: number of weights.

    Returns:
        ``(gradient, used)``: the gradient of the fitness, a log loss, of shape ``(count,)``; and
            the results with finite fitness, from which it follows.
    """
    total, used = torch.zeros(count), []
    for result in results:
        if result.fitness is None:
            continue
        plus, minus = result.fitness.split(pairs)
        difference = (plus - minus).clamp(-_LARGEST_DIFFERENCE, _LARGEST_DIFFERENCE).float()
        if not torch.isfinite(difference).all():
            continue
        directions = perturbations(result.seed, pairs, count)
        total += (torch.asinh(difference / _UNIT)[:, None] * directions).sum(0)
        used.append(result)
    return total / max(1, pairs * len(used)), used


# ---- processes

#: Maps a method of :class:`Runs` over jobs, in their order, as results come.
RunMap: TypeAlias = Callable[[Callable[[Runs, Any], Any], Iterable[Any]], Iterator[Any]]

_runs: Runs  # of a worker process


@contextmanager
def workers(
    count: int, recipe: EvolutionRecipe, data: DataOptions, given: TaskFamily | None
) -> Iterator[RunMap]:
    """A map over ``count`` processes of one thread each.

    New processes import the main module, as :mod:`multiprocessing` does: a script that uses more
    than one worker needs ``if __name__ == "__main__":``.

    Raises:
        TrainingError: a worker died, for lack of memory say.
        ValueError: the tasks cannot be sent to other processes.
    """
    check_picklable(given, count)
    spawn = multiprocessing.get_context("spawn")  # a fork copies locks that other threads hold
    # The tasks are sent to each worker once, not with every job: their data may be large.
    with ProcessPoolExecutor(count, spawn, _begin_worker, (recipe, data, given)) as pool:
        try:
            yield lambda method, jobs: pool.map(partial(_in_worker, method), jobs)
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps for lack of memory: start again with fewer "
                "--workers, to go on from the last meta-step"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(recipe: EvolutionRecipe, data: DataOptions, given: TaskFamily | None) -> None:
    global _runs
    torch.set_num_threads(1)
    _runs = Runs(recipe, data, given)


def _in_worker(method: Callable[[Runs, Any], Any], job: Any) -> Any:
    return method(_runs, job)
