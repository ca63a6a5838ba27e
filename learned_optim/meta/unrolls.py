"""One optimizee run of a meta-training by unrolls: a meta-gradient and a meta-step for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from learned_optim.meta.estimators import ESTIMATORS, EstimatorOptions
from learned_optim.meta.meta_loss import SMALLEST_LOSS, imitation, loss_weights
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.schedules import Plan
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily


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
    plan = Plan.draw(recipe, epoch, seeded(recipe.seed, "plan", epoch, run))
    total, done = 0.0, 0
    unrolls = sum(learns for _, learns in plan.unrolls)
    runs_before = (epoch - 1) * recipe.runs_per_epoch + run
    for steps, learns in plan.unrolls:
        if not learns:
            for _ in range(steps):
                total += optimizees.advance(rule).mean().item()
            continue
        options = replace(options, weights=loss_weights(recipe, optimizees.step, plan.length))
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
    return total * recipe.horizon / sum(steps for steps, _ in plan.unrolls), 0


def _estimator_options(recipe: Recipe, ranks: Ranks, epoch: int, run: int) -> EstimatorOptions:
    """Of one run; their generator, and what is imitated, go on from unroll to unroll."""
    return EstimatorOptions(
        coordinates=recipe.coordinates,
        generator=seeded(recipe.seed, "coordinates", epoch, run, ranks.task_rank),
        sampling=recipe.sampling,
        fitness=recipe.fitness,
        pairs=recipe.pairs,
        sigma=recipe.sigma,
        compression=recipe.compression,
        compression_unit=recipe.compression_unit,
        imitation=imitation(recipe, epoch),
        rank=ranks.rank,
        world=ranks.world,
    )
