"""What the worker processes of an evolution-strategies training do: runs of one task each."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learned_optim.meta.evolution_tasks import (
    RunSource,
    given_family,
    set_given_family,
)
from learned_optim.meta.populations import ADAMW_LRS as MIXTURE_LRS
from learned_optim.meta.populations import (
    fitness,
    roll,
    roll_adamw,
    scores,
)
from learned_optim.meta.progress import TrainingError
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.recipes._evolution import MOST_VALIDATION_TASKS
from learned_optim.meta.references import ADAMW_LRS, Reference
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import RuleConfig, UpdateRule, rule_for

#: Maps a function over jobs, in their order, as results come.
Map: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

#: Seeds of the validation tasks: training never has one of them, see :func:`training_seed`.
VALIDATION_SEEDS = range(10_000_000, 10_000_000 + MOST_VALIDATION_TASKS)
#: Validation runs are at least this long, where they are not too costly for that.
SHORTEST_VALIDATION = 150

# Fitness differences, in log loss, are cut off here, and compressed beyond the second number.
_LARGEST_DIFFERENCE, _UNIT = 3.0, 0.02
#: Errors of a run that say something of its task or weights: it is left out, and counted.
_RUN_ERRORS = (ArithmeticError, RuntimeError, ValueError)


@dataclass(frozen=True)
class TaskJob:
    """Runs of one task under the pairs of perturbed weights; ``weights`` of shape ``(n,)``."""

    seed: int
    weights: Tensor
    recipe: EvolutionRecipe
    source: RunSource
    large: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What came of it.

    Attributes:
        seed: the task's.
        family: what kind of task was drawn; empty if none could be.
        fitness: of ``weights + perturbation`` for every pair, then of ``weights - perturbation``,
            float64 of shape ``(2 * pairs,)``; None if the run failed.
        seconds: how long it took.
        error: why it failed.
    """

    seed: int
    family: str
    fitness: Tensor | None
    seconds: float
    error: str = ""

    def metrics(self) -> dict[str, Any]:
        """Of a result that was used: mean fitness, and mean difference within a pair."""
        assert self.fitness is not None
        plus, minus = self.fitness.chunk(2)
        return {
            "seed": self.seed,
            "family": self.family,
            "fitness": self.fitness.mean().item(),
            "difference": (plus - minus).abs().mean().item(),
            "seconds": self.seconds,
        }

    def failure(self) -> dict[str, Any]:
        """Of a result that was not."""
        return {"seed": self.seed, "family": self.family, "error": self.error}


@dataclass(frozen=True)
class ValidationJob:
    """One run of validation task ``index`` for every row of ``weights``, ``(B, n)``."""

    index: int
    source: RunSource
    weights: Tensor
    rule: RuleConfig


def training_seed(number: int) -> int:
    """The seed of a training task by its number; different numbers have different seeds."""
    return number if number < VALIDATION_SEEDS.start else number + len(VALIDATION_SEEDS)


def perturbations(seed: int, pairs: int, count: int) -> Tensor:
    """Standard normal directions of a task's pairs, float32 of shape ``(pairs, count)``."""
    return torch.randn(pairs, count, generator=torch.Generator().manual_seed(seed))


def run_task(job: TaskJob) -> TaskResult:
    """Run a task under all perturbed weights, side by side on the same batches."""
    started, family, recipe = time.perf_counter(), "", job.recipe
    try:
        run = job.source.draw(job.seed, job.large)
        family = run.task.name
        change = perturbations(job.seed, recipe.pairs, len(job.weights)) * recipe.sigma
        weights = torch.cat((job.weights + change, job.weights - change))
        losses, held_out = roll(_rule(recipe.rule), weights, run, job.seed)
        found = fitness(losses, run.known, held_out)
    except _RUN_ERRORS as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return TaskResult(job.seed, family, None, time.perf_counter() - started, said)
    return TaskResult(job.seed, family, found, time.perf_counter() - started)


def meta_gradient(
    results: Sequence[TaskResult], pairs: int, count: int
) -> tuple[Tensor, list[TaskResult]]:
    """The gradient of the weights, up to its length, from the fitness of perturbed weights.

    Args:
        results: one per task.
        pairs: perturbations per task.
        count: number of weights.

    Returns:
        ``(gradient, used)``: shape ``(count,)``, uphill in fitness and so in loss; and the results
        behind it, without those whose fitness is missing or not finite.
    """
    total, used = torch.zeros(count), []
    for result in results:
        if result.fitness is None:
            continue
        plus, minus = result.fitness.split(pairs)
        limit = _LARGEST_DIFFERENCE
        difference = (plus - minus).clamp(-limit, limit).float()
        if not torch.isfinite(difference).all():
            continue
        directions = perturbations(result.seed, pairs, count)
        weights = torch.asinh(difference / _UNIT)
        total += (weights[:, None] * directions).sum(0)
        used.append(result)
    return total / max(1, pairs * len(used)), used


def validate_task(job: ValidationJob) -> list[float]:
    """Log of the final over the first loss, of every row of weights."""
    seed = VALIDATION_SEEDS.start + job.index
    run = job.source.draw_validation(seed, SHORTEST_VALIDATION)
    losses, _ = roll(_rule(job.rule), job.weights, run, seed)
    final: list[float] = scores(losses)[0].tolist()
    return final


def reference_task(job: tuple[int, RunSource]) -> Reference:
    """AdamW on validation task ``job[0]``, at every peak learning rate."""
    index, source = job
    seed = VALIDATION_SEEDS.start + index
    run = source.draw_validation(seed, SHORTEST_VALIDATION)
    # Mixtures keep the rates that their references were always made with.
    rates = MIXTURE_LRS if source.is_mixture else ADAMW_LRS
    final = scores(roll_adamw(rates, run, seed))[0]
    return Reference(index, run.task.name, run.steps, run.known, tuple(final.tolist()))


@contextmanager
def worker_map(workers: int, given: TaskFamily | None = None) -> Iterator[Map]:
    """A map over ``workers`` processes of one thread each; of this process itself for 1.

    New processes import the main module, as :mod:`multiprocessing` does: a script that uses more
    than one worker needs ``if __name__ == "__main__":``.

    Args:
        workers: how many.
        given: the tasks, if they were handed over in Python.

    Raises:
        TrainingError: a worker died, for lack of memory say.
        ValueError: the tasks cannot be sent to other processes.
    """
    if workers == 1:
        with given_family(given):
            yield map
        return
    _check_picklable(given, workers)
    spawn = multiprocessing.get_context("spawn")  # a fork copies locks that other threads hold
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (given,)) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps for lack of memory: start again with fewer "
                "--workers, to go on from the last meta-step"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_picklable(given: TaskFamily | None, workers: int) -> None:
    try:
        pickle.dumps(given)
    except Exception as error:  # whatever an object of the user's raises
        raise ValueError(
            f"workers={workers} need tasks that can be sent to other processes, and these cannot "
            f"({error}): define functions and classes at the top of a module, or use one worker"
        ) from error


def _begin_worker(given: TaskFamily | None) -> None:
    torch.set_num_threads(1)
    set_given_family(given)


@lru_cache(maxsize=2)
def _rule(config: RuleConfig) -> UpdateRule:
    return rule_for(config)
