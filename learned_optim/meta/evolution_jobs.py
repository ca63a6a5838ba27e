"""What the worker processes of an evolution-strategies training do: runs of one task each."""

from __future__ import annotations

import math
import multiprocessing
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

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations import ADAMW_LRS, draw, fitness, roll, roll_adamw, scores
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.trainer import TrainingError
from learned_optim.rules import RuleConfig, UpdateRule, rule_for

#: Maps a function over jobs, in their order, as results come.
Map: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

#: Seeds of the validation tasks begin here, far from those of training.
FIRST_VALIDATION_SEED = 10_000_000
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
    data: DataOptions
    large: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What came of it.

    Attributes:
        seed: the task's.
        family: name of the task's class; empty if the task could not be drawn.
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
    mixture: str
    weights: Tensor
    rule: RuleConfig
    data: DataOptions


@dataclass(frozen=True)
class Reference:
    """AdamW on a validation task.

    Attributes:
        index: of the validation task.
        task: what was drawn.
        steps: length of the run.
        known: whether the rule is told the length, and AdamW follows a cosine.
        scores: log of the final over the first loss, by peak learning rate.
    """

    index: int
    task: str
    steps: int
    known: bool
    scores: tuple[float, ...]


def perturbations(seed: int, pairs: int, count: int) -> Tensor:
    """Standard normal directions of a task's pairs, float32 of shape ``(pairs, count)``."""
    return torch.randn(pairs, count, generator=torch.Generator().manual_seed(seed))


def run_task(job: TaskJob) -> TaskResult:
    """Run a task under all perturbed weights, side by side on the same batches."""
    started, family, recipe = time.perf_counter(), "", job.recipe
    try:
        run = draw(job.seed, job.data, large=job.large, mixture=recipe.task)
        family = type(run.task).__name__
        change = perturbations(job.seed, recipe.pairs, len(job.weights)) * recipe.sigma
        weights = torch.cat((job.weights + change, job.weights - change))
        losses = roll(_rule(recipe.rule), weights, run, job.seed)
        found = torch.from_numpy(fitness(losses, run.known))
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
    seed = FIRST_VALIDATION_SEED + job.index
    run = draw(seed, job.data, SHORTEST_VALIDATION, mixture=job.mixture)
    final: list[float] = scores(roll(_rule(job.rule), job.weights, run, seed))[0].tolist()
    return final


def reference_task(job: tuple[int, str, DataOptions]) -> Reference:
    """AdamW on validation task ``job[0]`` of mixture ``job[1]``, at every peak learning rate."""
    index, mixture, data = job
    seed = FIRST_VALIDATION_SEED + index
    run = draw(seed, data, SHORTEST_VALIDATION, mixture=mixture)
    final = scores(roll_adamw(ADAMW_LRS, run, seed))[0]
    return Reference(index, run.task.name, run.steps, run.known, tuple(final.tolist()))


def best_score(reference: Reference) -> float:
    """The score of tuned AdamW: the best over its learning rates."""
    finite = [score for score in reference.scores if not math.isnan(score)]
    return min(finite, default=math.nan)


@contextmanager
def worker_map(workers: int) -> Iterator[Map]:
    """A map over ``workers`` processes of one thread each; of this process itself for 1.

    New processes import the main module, as :mod:`multiprocessing` does: a script that uses more
    than one worker needs ``if __name__ == "__main__":``.

    Raises:
        TrainingError: a worker died, for lack of memory say.
    """
    if workers == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # a fork copies locks that other threads hold
    with ProcessPoolExecutor(workers, spawn, _one_thread) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps for lack of memory: start again with fewer "
                "--workers, to go on from the last meta-step"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache(maxsize=2)
def _rule(config: RuleConfig) -> UpdateRule:
    return rule_for(config)
