"""Meta-training by unrolls: every unroll of an optimizee run is a meta-step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions
from learned_optim.meta.estimators import ESTIMATORS, EstimatorOptions
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Method, Report, Round, Validation
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily, TaskOptions, build_tasks
from learned_optim.meta.validation import (
    ADAMW_LRS,
    Reference,
    Seed,
    mean_of,
    read_references,
    summed_losses,
    tuned_sums,
    write_references,
)
from learned_optim.rules import UpdateRule

# Least divisor of a meta-gradient with `relative_loss`: a task of smaller loss is solved.
SMALLEST_LOSS = 1e-3


def plan_of_run(recipe: Recipe, generator: Generator) -> list[tuple[int, bool]]:
    """Inner steps of each unroll of a run, and whether a meta-step follows.

    Steps after the last meta-step are left out: nothing is learned from them.
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


class Unrolls(Method):
    """Epochs of runs; the best validation selects the weights, which fresh runs test.

    Ranks share the tasks of a run. Arguments are those of :class:`learned_optim.meta.MetaTrainer`.
    """

    unit, keeps_best = "epoch", True
    family: TaskFamily

    def __init__(
        self,
        recipe: Recipe,
        data: DataOptions,
        folder: Path,
        family: TaskFamily | None,
        test_family: TaskFamily | None,
        against_adamw: bool,
    ) -> None:
        self.recipe, self.task, self.given = recipe, recipe.task, family
        self.rounds, self.runs_per_round = recipe.epochs, recipe.runs_per_epoch
        longest = recipe.long_horizon if recipe.long_fraction else None
        self.longest_run = longest or recipe.horizon
        self.average, self.clip_norm = recipe.average, recipe.clip_norm
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if recipe.tasks_per_meta_step % self.world:
            raise ValueError(
                f"tasks_per_meta_step={recipe.tasks_per_meta_step} cannot be shared evenly by "
                f"{self.world} ranks: make it a multiple"
            )
        if self.rank > 0:
            self.barrier()  # rank 0 downloads what is missing, alone
        self.family = family or build_tasks(recipe.task, TaskOptions("meta", data))
        self._test_task, self._test_family = recipe.test_task or recipe.task, self.family
        tests_by_name = test_family is None and (family is None or recipe.test_task is not None)
        if tests_by_name:
            self._test_family = build_tasks(self._test_task, TaskOptions("evaluation", data))
        elif test_family is not None:
            check_family(test_family, f"{recipe.task} (test)")
            self._test_family = test_family
        if self.rank == 0:
            self.barrier()
        named = [] if family else [recipe.task]
        self.registered = list(dict.fromkeys(named + [self._test_task] * tests_by_name))
        self._validation_horizon = recipe.validation_horizon or recipe.horizon
        self._seeds: list[Seed] = [
            (recipe.seed, "validation", run) for run in range(recipe.validation_runs)
        ]
        self._folder, self._against_adamw = folder, against_adamw
        self._adamw: float | None = None  # its validation
        alone = None if self.family.stackable else self.family.alone_because
        if alone and recipe.tasks_per_meta_step > self.world:
            self.note = f"forward passes one optimizee after another: {alone}"

    def barrier(self) -> None:
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def session(self, report: Report) -> Iterator[None]:
        if self._against_adamw:
            self._adamw = self._tuned_adamw(report)
        yield

    # ---- training

    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        runs, finite = self.recipe.runs_per_epoch, []
        for run in range(runs):
            with global_generator_seeded(self.recipe.seed, "forward", number, run, self.rank):
                loss = self.train_run(optimizer, number, run)
            if math.isfinite(loss):
                finite.append(loss)
            self.runs_done = run + 1
            report(f"epoch {number} loss {loss:.1f}")
        dropped = runs - len(finite)
        why = (
            f"all of its {dropped} unrolls met a loss or a gradient that is not finite, and so did "
            f"validation"
        )
        mean = sum(finite) / len(finite) if finite else math.inf
        return Round(mean, dropped, why, runs * self.recipe.tasks_per_meta_step)

    def train_run(self, optimizer: MetaOptimizer, epoch: int, run: int) -> float:
        """Train the rule on one run of ``tasks_per_meta_step`` optimizees side by side.

        The optimizer takes a step per unroll. Epochs are counted from 1, runs in them from 0.

        Returns:
            The mean over optimizees of the mean loss times the horizon. Infinite if a loss or
            gradient of an unroll was not finite: the unroll is dropped, and the run ends there.
        """
        recipe, rule = self.recipe, optimizer.rule
        share = range(self.rank, recipe.tasks_per_meta_step, self.world)
        generators = [seeded(recipe.seed, "train", epoch, run, task) for task in share]
        tasks = [self.family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, stacked=self.family.stackable)
        options = EstimatorOptions(
            coordinates=recipe.coordinates,
            generator=seeded(recipe.seed, "coordinates", epoch, run, self.rank),
            sampling=recipe.sampling,
            pairs=recipe.pairs,
            sigma=recipe.sigma,
        )
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
            packed = torch.cat([*map(torch.flatten, meta.grads), meta.losses.mean(1).sum()[None]])
            if self.world > 1:
                dist.all_reduce(packed)
                packed /= self.world
            if not torch.isfinite(packed).all():
                # Averaging it in would poison the weights, and the optimizee will not recover.
                return math.inf
            unroll_loss = packed[-1].item()
            total += unroll_loss
            if recipe.relative_loss:
                packed /= max(unroll_loss / steps, SMALLEST_LOSS)
            every = recipe.epochs * recipe.runs_per_epoch * unrolls
            optimizer.step(packed[:-1], (runs_before * unrolls + done) / every)
            done += 1
        # Per horizon, so that runs of different lengths compare.
        return total * recipe.horizon / sum(steps for steps, _ in plan)

    # ---- validation and test

    @torch.no_grad()
    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Mean of the summed losses of the validation runs; infinite if not finite."""
        sums = self._validation_sums(rule, _counter(report, "validation", len(self._seeds)))
        value, adamw, ratio = self._mean(sums), self._adamw, None
        if adamw is not None and math.isfinite(adamw) and adamw > 0 and math.isfinite(value):
            ratio = value / adamw
        return Validation(value, ratio, {"validation": value})

    def _mean(self, sums: Tensor) -> float:
        return mean_of(sums, self.recipe.validation_mean == "geometric")

    def _sums(
        self,
        optimizer: UpdateRule | float,
        family: TaskFamily,
        seeds: Sequence[Seed],
        on_runs: Callable[[int], None],
    ) -> Tensor:
        """Summed losses of the runs of these seeds, ``(seeds,)``."""
        width = max(8, self.recipe.tasks_per_meta_step) if family.stackable else 1
        return summed_losses(optimizer, family, self._validation_horizon, seeds, width, on_runs)

    def _validation_sums(
        self, optimizer: UpdateRule | float, on_runs: Callable[[int], None]
    ) -> Tensor:
        """Summed losses of all validation runs, float64; ranks share the runs."""
        sums, ours = torch.zeros(len(self._seeds)).double(), slice(self.rank, None, self.world)
        if self._seeds[ours]:
            sums[ours] = self._sums(optimizer, self.family, self._seeds[ours], on_runs).double()
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def _tuned_adamw(self, report: Report) -> float:
        """Validation of AdamW, tuned on the validation runs.

        All ranks must take part. Each rate's scores are saved in ``references.json``, and only
        missing rates run.

        Raises:
            ValueError: the file is damaged.
        """
        references = read_references(self._folder) or self._blank_references()
        runs = len(self._seeds)
        for index in range(min(len(r.scores) for r in references), len(ADAMW_LRS)):
            on_runs = _counter(report, "AdamW", len(ADAMW_LRS) * runs, index * runs)
            scores = self._validation_sums(ADAMW_LRS[index], on_runs).nan_to_num(nan=math.inf)
            references = [
                replace(reference, scores=(*reference.scores[:index], score))
                for reference, score in zip(references, scores.tolist(), strict=True)
            ]
            if self.rank == 0:
                write_references(self._folder, references)
        return self._mean(tuned_sums(references))

    def _blank_references(self) -> list[Reference]:
        """References without scores; runs whose task is one object share its name."""
        tasks = [self.family.sample(seeded(*seed)) for seed in self._seeds]
        labels: dict[int, str] = {}
        for task in tasks:
            labels.setdefault(id(task), f"task {len(labels)}")
        return [Reference(index, labels[id(task)]) for index, task in enumerate(tasks)]

    def test(self, rule: UpdateRule, report: Report) -> dict[str, Any]:
        seeds: list[Seed] = [(self.recipe.seed, "test", i) for i in range(self.recipe.test_runs)]
        sums = self._sums(rule, self._test_family, seeds, _counter(report, "test", len(seeds)))
        figures = {
            "mean": sums.mean().item(),
            "std": sums.std().item(),
            "geometric_mean": sums.log().mean().exp().item(),
            "runs": len(sums),
            "task": self._test_task,
        }
        return {"test": figures}

    # ---- the record

    def summary(self, record: dict[str, Any]) -> str:
        recipe, test = self.recipe, record["test"]
        if recipe.validation_mean == "geometric":
            tested = f"{_number(test['geometric_mean'])} (geometric means)"
        else:
            tested = f"{_number(test['mean'])} ± {_number(test['std'])}"
        of = f" of {recipe.test_task}" if recipe.test_task else ""
        ratio = record["ratio_to_adamw"]
        against = "" if ratio is None else f"{ratio:.2f} of tuned AdamW's, "
        return (
            f"loss summed over {self._validation_horizon} steps: validation "
            f"{_number(record['validation'])} ({against}best epoch {record['epoch']} of "
            f"{record['rounds']}), test on {test['runs']} fresh runs{of} {tested}"
        )


def _counter(report: Report, what: str, total: int, before: int = 0) -> Callable[[int], None]:
    """Reports the number of runs done."""
    return lambda done: report(f"{what} {before + done}/{total}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


@contextmanager
def process_group() -> Iterator[None]:
    """Under ``torchrun``, a process group, unless the script has begun one."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    # Optimizers import this; were the group there already, default arguments in it would keep the
    # group, and its threads, past its end. A thread that lets go of a tensor while the interpreter
    # ends aborts the process.
    import torch.distributed.nn  # noqa: F401

    # Restarted ranks may share a store with those before them, whose addresses are still in it.
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    # Meta-gradients are on the CPU, even where there is a GPU.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
