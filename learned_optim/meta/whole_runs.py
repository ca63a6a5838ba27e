"""Meta-training by antithetic evolution strategies on whole runs.

Every meta-step draws tasks, and for each task pairs of opposite perturbations of the rule's weights
(Salimans et al. 2017, arXiv 1703.03864). All perturbed rules of a task train side by side, on the
same batches, from the first step to the last: nothing is truncated, and fitness is mostly where a
run ends. Differences of a pair's fitness, in log loss, are compressed by ``asinh``, so that one
diverging run does not outweigh all others. The gradient of the weights is the mean over pairs of
difference times direction.

Runs take place in this process or in workers.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim.meta.checks import check_picklable
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Method, Report, Round, TrainingError, Validation
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations.mixture import (
    MIXTURES,
    SHORTEST_RUN,
    TRAINED_FOR,
    UNKNOWN_SHARE,
    Draw,
    draw,
)
from learned_optim.meta.populations.rollout import ADAMW_LRS as MIXTURE_LRS
from learned_optim.meta.populations.rollout import fitness, roll, roll_adamw, scores
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
from learned_optim.meta.validation import ADAMW_LRS, Reference, read_references, write_references
from learned_optim.rules import UpdateRule, rule_for

#: Seeds of the validation tasks; :func:`training_seed` skips them.
VALIDATION_SEEDS = range(10_000_000, 10_100_000)
# Least number of steps of a mixture's validation runs, unless they are too costly.
_SHORTEST_VALIDATION = 150
# Fitness differences, in log loss, are cut off at `_LARGEST_DIFFERENCE` and compressed by asinh
# beyond `_UNIT`.
_LARGEST_DIFFERENCE, _UNIT = 3.0, 0.02
# Bound on the excess of a task, in log loss behind tuned AdamW, in the mean over tasks.
_LARGEST_EXCESS = 1.5
# Errors of a single run: the task is skipped and counted.
_RUN_ERRORS = (ArithmeticError, RuntimeError, ValueError)

#: Maps a method of :class:`Runs` over jobs, in their order, as results come.
RunMap: TypeAlias = Callable[[Callable[["Runs", Any], Any], Iterable[Any]], Iterator[Any]]


class WholeRuns(Method):
    """Meta-steps on whole runs; validation compares final losses with tuned AdamW's.

    Arguments are those of :class:`learned_optim.meta.MetaTrainer`.
    """

    unit, keeps_best = "meta-step", False
    average = 0.98
    betas = (0.9, 0.99)  # gradients of few tasks are noisy, and their size changes fast

    def __init__(
        self,
        recipe: EvolutionRecipe,
        data: DataOptions,
        folder: Path,
        workers: int,
        family: TaskFamily | None,
    ) -> None:
        if dist.is_torchelastic_launched():
            raise ValueError(
                "evolution strategies share work among processes of one machine: start them "
                "without torchrun, with workers"
            )
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.recipe, self.data, self.folder, self.workers = recipe, data, folder, workers
        self.task, self.given, self.rounds = recipe.task, family, recipe.meta_steps
        self.registered = [] if family else [recipe.task]
        self.runs = Runs(recipe, data, family)
        self.family = self.runs.family
        self.longest_run = recipe.horizon or max(kind.longest_run for kind in MIXTURES[recipe.task])
        self._map: RunMap = self._map_here

    def _map_here(self, method: Callable[[Runs, Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(partial(method, self.runs), jobs)

    def check_rule(self, rule: UpdateRule) -> None:
        super().check_rule(rule)
        if rule.needs_loss:
            raise ValueError(
                f"rule {rule.name!r} reads the loss, which evolution strategies do not hand to it: "
                f"configure it without, or train it by a recipe of backpropagation"
            )

    @contextmanager
    def session(self, report: Report) -> Iterator[None]:
        if self.family is None:
            load_images("mnist", True, self.data)  # now, not in a worker
        if self.workers == 1:
            yield
            return
        with workers(self.workers, self.recipe, self.data, self.given) as self._map:
            try:
                yield
            finally:
                self._map = self._map_here

    # ---- training

    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        recipe, weights = self.recipe, optimizer.weights
        first = 100_000 * (recipe.seed + 1) + (number - 1) * recipe.tasks_per_meta_step
        share = recipe.large_share if number > recipe.large_from else 0.0
        large = round(share * recipe.tasks_per_meta_step)
        jobs = [
            (training_seed(first + i), weights, i < large)
            for i in range(recipe.tasks_per_meta_step)
        ]
        results = list(self._map(Runs.train, jobs))
        gradient, used = meta_gradient(results, recipe.pairs, len(weights))
        why = next((r.error for r in results if r.error), "no fitness was finite")
        if used:
            optimizer.step(gradient, (number - 1) / self.rounds)
        skipped = [result for result in results if result not in used]
        failures = [{"seed": r.seed, "family": r.family, "error": r.error} for r in skipped]
        details = {"gradient_norm": gradient.norm().item(), "skipped": failures}
        values = [result.fitness.mean().item() for result in used if result.fitness is not None]
        meta_loss = sum(values) / len(values) if values else math.inf
        why = f"none of its {len(results)} tasks gave a finite fitness ({why})"
        return Round(meta_loss, len(skipped), why, 2 * recipe.pairs * len(results), details)

    # ---- validation

    def validates_after(self, number: int) -> bool:
        return number % self.recipe.validation_every == 0 or number == self.rounds

    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Log of the ratio of the final loss to that of tuned AdamW.

        Figures are the ``mean`` over tasks, each counting at most 1.5, and ``share_ahead``, the
        share of tasks on which the rule ends below AdamW.
        """
        weights = parameters_to_vector(rule.parameters()).detach()
        against, behind = self.references(report), []
        results = self._map(Runs.validate, [(reference.index, weights) for reference in against])
        for reference, score in zip(against, results, strict=True):
            behind.append(score - reference.best)
            report(f"validation {len(behind)}/{len(against)}")
        excess = torch.tensor(behind, dtype=torch.float64)  # (tasks,)
        mean = excess.clamp(max=_LARGEST_EXCESS).mean().item()
        figures = {"mean": mean, "share_ahead": (excess < 0).double().mean().item()}
        value, ratio = (mean, math.exp(mean)) if math.isfinite(mean) else (math.inf, None)
        return Validation(value, ratio, {"behind_adamw": {"average": figures}})

    def references(self, report: Report) -> list[Reference]:
        """Tuned AdamW on the validation tasks; runs those that the folder lacks.

        Raises:
            ValueError: ``references.json`` is damaged.
        """
        count = self.recipe.validation_tasks
        references = {reference.index: reference for reference in read_references(self.folder)}
        missing = [index for index in range(count) if index not in references]
        for reference in self._map(Runs.reference, missing):
            references[reference.index] = reference
            write_references(self.folder, [references[index] for index in sorted(references)])
            report(f"AdamW {len(references)}/{count}")
        return [references[index] for index in range(count)]

    # ---- the record

    def trained_on(self) -> dict[str, Any]:
        if self.family is None:
            data = f"mixture {self.task}; MNIST's meta half is all real data in it"
            return {"data": data, "trained_for": TRAINED_FOR[self.task]}
        trained_for = f"runs of {self.recipe.horizon} steps of {self.task}"
        return {**super().trained_on(), "trained_for": trained_for}

    def summary(self, record: dict[str, Any]) -> str:
        average = record["behind_adamw"]["average"]
        return (
            f"final loss on {self.recipe.validation_tasks} validation runs: "
            f"{math.exp(average['mean']):.2f} of tuned AdamW's (geometric mean), ahead on "
            f"{average['share_ahead']:.0%}"
        )


# ---- the estimate


@dataclass(frozen=True)
class TaskResult:
    """Fitness of a task's runs.

    Attributes:
        seed: of the task.
        family: kind of the task.
        fitness: of ``weights + perturbation`` for every pair, then of ``weights - perturbation``,
            float64 of shape ``(2 * pairs,)``; ``None`` if the run failed.
        error: cause of the failure.
    """

    seed: int
    family: str
    fitness: Tensor | None
    error: str = ""


def training_seed(number: int) -> int:
    """The seed of the training task with this number; it is no validation seed."""
    return number if number < VALIDATION_SEEDS.start else number + len(VALIDATION_SEEDS)


def perturbations(seed: int, pairs: int, count: int) -> Tensor:
    """Standard normal directions of a task's pairs, float32 of shape ``(pairs, count)``."""
    return torch.randn(pairs, count, generator=torch.Generator().manual_seed(seed))


def meta_gradient(
    results: Sequence[TaskResult], pairs: int, count: int
) -> tuple[Tensor, list[TaskResult]]:
    """The meta-gradient, up to its length, from the fitness of ``count`` perturbed weights.

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


# ---- runs


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
        self.recipe, self.data, self.family = recipe, data, given
        self._rule = rule_for(recipe.rule)
        if given is None and recipe.task not in MIXTURES:
            self.family = build_tasks(recipe.task, TaskOptions("meta", data))

    def draw(self, seed: int, large: bool = False, shortest: int = SHORTEST_RUN) -> Draw:
        """The run of a seed.

        Of mixtures, ``large`` takes sizes from the upper part of their ranges, and ``shortest`` is
        the least number of steps.
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
        """Run a task under all perturbed weights on the same batches.

        ``job``: seed, weights of shape ``(n,)``, and whether the task is a large one.
        """
        seed, weights, large = job
        values, failure = None, ""
        run = self.draw(seed, large)
        try:
            change = perturbations(seed, self.recipe.pairs, len(weights)) * self.recipe.sigma
            weights = torch.cat((weights + change, weights - change))
            losses, held_out = roll(self._rule, weights, run, seed)
            values = fitness(losses, run.known, held_out)
        except _RUN_ERRORS as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return TaskResult(seed, run.task.name, values, failure)

    def validate(self, job: tuple[int, Tensor]) -> float:
        """Log of the final over the first loss, by validation task and weights ``(n,)``."""
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


class TaskPopulation(Population):
    """Copies of one optimizee under different weights of the rule.

    All copies see the same batches, and the same random numbers in their forward passes. Buffers,
    such as batch norm's statistics, are each copy's own. The loss of a ``stacked`` task runs under
    ``vmap``.
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
        return self._task.init(generator)

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


# ---- processes

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
