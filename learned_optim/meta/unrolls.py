"""One optimizee run of a meta-training by unrolls: a meta-gradient and a meta-step for each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Generator

from learned_optim.meta.estimators import ESTIMATORS, EstimatorOptions
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily

# Loss below which nothing is divided any further: such a task is solved.
SMALLEST_LOSS = 1e-3


@dataclass(frozen=True)
class Ranks:
    """What this process does of a meta-step.

    Ranks share the tasks, or, where the estimator perturbs the weights, the pairs of perturbed runs
    of all tasks.

    Attributes:
        rank: number of this process.
        world: processes in all.
        perturbs: whether the pairs are shared.
    """

    rank: int
    world: int
    perturbs: bool

    @property
    def task_rank(self) -> int:
        """The first task of this process."""
        return 0 if self.perturbs else self.rank

    @property
    def task_world(self) -> int:
        """Among how many processes the tasks are shared."""
        return 1 if self.perturbs else self.world


def plan_of_run(recipe: Recipe, generator: Generator) -> list[tuple[int, bool]]:
    """How a run is cut into unrolls: of each, its inner steps and whether it ends in a meta-step.

    What follows the last meta-step is left out, because it would teach nothing.
    """
    length, truncation = recipe.horizon, recipe.truncation
    tail, u = torch.rand(2, generator=generator).tolist()
    if recipe.long_horizon is not None and tail < recipe.long_fraction:
        length = round(length * (recipe.long_horizon / length) ** u)
        truncation = recipe.long_truncation or truncation
    whole, rest = divmod(length, truncation)
    steps = [truncation] * whole + [rest] * (rest > 0)
    drawn = torch.randperm(len(steps), generator=generator)[: recipe.unrolls_per_run or len(steps)]
    chosen = set(drawn.tolist())
    return [(n, i in chosen) for i, n in enumerate(steps[: max(chosen) + 1])]


def train_run(
    recipe: Recipe,
    family: TaskFamily,
    meta_optimizer: MetaOptimizer,
    ranks: Ranks,
    epoch: int,
    run: int,
) -> tuple[float, int]:
    """Train the rule on one run of ``recipe.tasks_per_meta_step`` optimizees side by side.

    Args:
        recipe: how.
        family: of the optimizees.
        meta_optimizer: takes a step per unroll.
        ranks: the share of this process.
        epoch: number of the epoch, from 1.
        run: number of the run in it, from 0.

    Returns:
        The mean over optimizees of the mean loss times the horizon, infinite if something was not
        finite; and the number of unrolls dropped for that, 0 or 1: the run ends there.
    """
    with global_generator_seeded(recipe.seed, "forward", epoch, run, ranks.task_rank):
        return _unrolls(recipe, family, meta_optimizer, ranks, epoch, run)


def _unrolls(
    recipe: Recipe,
    family: TaskFamily,
    meta_optimizer: MetaOptimizer,
    ranks: Ranks,
    epoch: int,
    run: int,
) -> tuple[float, int]:
    rule = meta_optimizer.rule
    share = range(ranks.task_rank, recipe.tasks_per_meta_step, ranks.task_world)
    generators = [seeded(recipe.seed, "train", epoch, run, task) for task in share]
    tasks = [family.sample(generator) for generator in generators]
    optimizees = Optimizees(rule, tasks, generators, stacked=family.stackable)
    options = _estimator_options(recipe, ranks, epoch, run)
    plan = plan_of_run(recipe, seeded(recipe.seed, "plan", epoch, run))
    total, done = 0.0, 0
    unrolls = sum(learns for _, learns in plan)
    runs_before = (epoch - 1) * recipe.runs_per_epoch + run
    for steps, learns in plan:
        if not learns:
            for _ in range(steps):
                total += optimizees.advance(rule).mean().item()
            continue
        meta = ESTIMATORS[recipe.estimator](rule, optimizees, steps, options)
        packed = torch.cat([g.flatten() for g in meta.grads] + [meta.losses.mean(1).sum()[None]])
        if ranks.task_world > 1:
            dist.all_reduce(packed)
            packed /= ranks.task_world
        if not torch.isfinite(packed).all():
            # Averaging it in would poison the weights, and the optimizee will not recover.
            return math.inf, 1
        unroll_loss = packed[-1].item()
        total += unroll_loss
        if recipe.relative_loss:
            packed /= max(unroll_loss / steps, SMALLEST_LOSS)
        every = recipe.epochs * recipe.runs_per_epoch * unrolls
        meta_optimizer.step(packed[:-1], (runs_before * unrolls + done) / every)
        done += 1
    # Per horizon, so that runs of different lengths compare.
    return total * recipe.horizon / sum(steps for steps, _ in plan), 0


def _estimator_options(recipe: Recipe, ranks: Ranks, epoch: int, run: int) -> EstimatorOptions:
    """Of one run; their generator goes on from unroll to unroll."""
    return EstimatorOptions(
        coordinates=recipe.coordinates,
        generator=seeded(recipe.seed, "coordinates", epoch, run, ranks.task_rank),
        sampling=recipe.sampling,
        pairs=recipe.pairs,
        sigma=recipe.sigma,
        rank=ranks.rank,
        world=ranks.world,
    )
