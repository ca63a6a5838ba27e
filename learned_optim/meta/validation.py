"""Validation and test runs of a meta-training by unrolls, and tuned AdamW on the former."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learned_optim.meta.progress import Report
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.references import (
    ADAMW_LRS,
    Reference,
    mean_sum,
    read_references,
    tuned_sums,
    write_references,
)
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import UpdateRule
from learned_optim.rules.classical import SGDRule

#: What :func:`seeded` makes a run's generator from.
Seed: TypeAlias = tuple[object, ...]


def summed_losses(
    rule: UpdateRule,
    family: TaskFamily,
    horizon: int,
    seeds: Sequence[Seed],
    together: int = 8,
    on_runs: Callable[[int], None] | None = None,
) -> Tensor:
    """Loss summed over ``horizon`` steps of frozen-rule runs, one per seed; shape ``(seeds,)``.

    Args:
        rule: trains the optimizees.
        family: of the optimizees.
        horizon: inner steps.
        seeds: of the runs.
        together: runs side by side.
        on_runs: told how many are done.
    """
    sums = [
        torch.stack([optimizees.advance(rule) for _ in range(horizon)]).sum(0)
        for optimizees in _together(rule, family, seeds, together, on_runs)
    ]
    return torch.cat(sums)


def adamw_sums(
    lr: float,
    family: TaskFamily,
    horizon: int,
    seeds: Sequence[Seed],
    together: int = 8,
    on_runs: Callable[[int], None] | None = None,
) -> Tensor:
    """:func:`summed_losses` under AdamW at a constant rate: rules do not know the length, too."""
    sums = []
    for optimizees in _together(SGDRule(), family, seeds, together, on_runs):
        # AdamW is coordinatewise: one packed tensor trains as its parts would.
        weights = nn.Parameter(optimizees.packed)
        adamw, total = torch.optim.AdamW([weights], lr=lr), torch.zeros(len(optimizees))
        for _ in range(horizon):
            losses, weights.grad = optimizees.losses_and_grad(weights, optimizees.next_batch())
            adamw.step()
            optimizees.step += 1
            total += losses.detach()
        sums.append(total)
    return torch.cat(sums)


def _together(
    rule: UpdateRule,
    family: TaskFamily,
    seeds: Sequence[Seed],
    together: int,
    on_runs: Callable[[int], None] | None,
) -> Iterator[Optimizees]:
    """Optimizees of the seeds, some at a time, at their initial parameters."""
    for low in range(0, len(seeds), together):
        generators = [seeded(*parts) for parts in seeds[low : low + together]]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, stacked=family.stackable)
        with global_generator_seeded(*seeds[low], "forward"):
            yield optimizees
        if on_runs is not None:
            on_runs(min(low + together, len(seeds)))


class Validator:
    """The validation and test runs of a recipe, the same whenever they are made.

    Args:
        recipe: seeds, horizon and number of the runs, and what mean is taken of them.
        family: of the validation runs.
        rank: number of this process.
        world: processes among which validation runs are shared.
    """

    def __init__(self, recipe: Recipe, family: TaskFamily, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.family, self.rank, self.world = recipe, family, rank, world
        self.horizon = recipe.validation_horizon or recipe.horizon
        self.seeds: list[Seed] = [
            (recipe.seed, "validation", i) for i in range(recipe.validation_runs)
        ]
        self._adamw: float | None = None

    @torch.no_grad()
    def mean(self, rule: UpdateRule, report: Report | None = None) -> float:
        """Mean summed loss over the validation runs, infinite if it is not finite.

        Args:
            rule: whose.
            report: told how far it is.
        """
        seeds = self.seeds[self.rank :: self.world]
        sums = self.sums(rule, self.family, seeds, "validation", report).double()
        geometric = self.recipe.validation_mean == "geometric"
        total = (sums.log() if geometric else sums).sum()
        if self.world > 1:
            dist.all_reduce(total)
        mean = total.item() / len(self.seeds)
        if not math.isfinite(mean):
            return math.inf
        return math.exp(mean) if geometric else mean

    def sums(
        self,
        rule: UpdateRule,
        family: TaskFamily,
        seeds: Sequence[Seed],
        what: str,
        report: Report | None = None,
    ) -> Tensor:
        """:func:`summed_losses` over the recipe's horizon.

        Args:
            rule: trains the optimizees.
            family: of the optimizees.
            seeds: of the runs.
            what: what ``report`` is told they are for.
            report: told how far it is.
        """
        if not seeds:
            return torch.zeros(0)
        on_runs = _counted(report, what, 0, len(seeds))
        return summed_losses(rule, family, self.horizon, seeds, self._together(family), on_runs)

    def _together(self, family: TaskFamily) -> int:
        return max(8, self.recipe.tasks_per_meta_step) if family.stackable else 1

    def ratio_to_adamw(self, validation: float) -> float | None:
        """A validation over that of tuned AdamW; ``None`` if that is unknown or not positive."""
        adamw = self._adamw
        if adamw is None or not (math.isfinite(adamw) and adamw > 0 and math.isfinite(validation)):
            return None
        return validation / adamw

    # ---- AdamW

    def tune_adamw(self, folder: Path, report: Report | None = None) -> None:
        """Run AdamW at every learning rate on the validation runs, as far as that is not done.

        All ranks must take part. Results are kept in ``references.json`` after each rate.

        Args:
            folder: where.
            report: told how far it is.

        Raises:
            ValueError: the file is damaged.
        """
        if self._adamw is not None:
            return
        found = read_references(folder) or self._blank_references()
        count = len(self.seeds)
        for index in range(min(len(r.scores) for r in found), len(ADAMW_LRS)):
            on_runs = _counted(report, "AdamW", index * count, len(ADAMW_LRS) * count)
            column = self._adamw_column(ADAMW_LRS[index], on_runs)
            found = [
                replace(reference, scores=(*reference.scores[:index], score))
                for reference, score in zip(found, column, strict=True)
            ]
            if self.rank == 0:
                write_references(folder, found)
        self._take(found)

    def load_adamw(self, folder: Path) -> None:
        """Take tuned AdamW's figures from the folder, if all are there.

        Raises:
            ValueError: the file is damaged.
        """
        self._take(read_references(folder))

    def _take(self, found: list[Reference]) -> None:
        if found and all(len(reference.scores) == len(ADAMW_LRS) for reference in found):
            self._adamw = mean_sum(tuned_sums(found), self.recipe.validation_mean == "geometric")

    def _adamw_column(self, lr: float, on_runs: Callable[[int], None] | None) -> list[float]:
        """Summed losses of all validation runs at one learning rate."""
        sums = torch.zeros(len(self.seeds), dtype=torch.float64)
        ours = slice(self.rank, None, self.world)
        if self.seeds[ours]:
            together = self._together(self.family)
            sums[ours] = adamw_sums(
                lr, self.family, self.horizon, self.seeds[ours], together, on_runs
            ).double()
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.nan_to_num(nan=math.inf).tolist()

    def _blank_references(self) -> list[Reference]:
        """One per validation run; those for which the family gives one object share a task."""
        tasks = [self.family.sample(seeded(*seed)) for seed in self.seeds]
        labels: dict[int, str] = {}
        for task in tasks:
            labels.setdefault(id(task), f"task {len(labels)}")
        return [
            Reference(index, labels[id(task)], self.horizon, known=False)
            for index, task in enumerate(tasks)
        ]


def _counted(
    report: Report | None, what: str, before: int, total: int
) -> Callable[[int], None] | None:
    """Reports of runs done, given how many were done before these."""
    if report is None:
        return None
    return lambda done: report(f"{what} {before + done}/{total}")
