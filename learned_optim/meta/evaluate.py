"""Evaluation: learned optimizers, untuned, against hand-written ones tuned per task.

The protocol. Per seed, every optimizer starts from the same initial parameters and sees the same
batches, and all of them run through their public ``torch.optim`` classes. Each baseline's learning
rate is chosen per task and horizon from :data:`~learned_optim.meta.baselines.LR_GRID` by the mean
summed loss over tuning seeds; the figures come from other seeds. Where it diverges on one of
those, the next best takes its place, in the baseline's favour. The learned optimizer runs at lr =
1.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learned_optim.checkpoint import write_text
from learned_optim.meta import provenance, runs
from learned_optim.meta.baselines import LR_GRID, baseline
from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions
from learned_optim.meta.leaks import check_blind
from learned_optim.meta.results import Result, best_baseline
from learned_optim.meta.runs import OptimizerSpec, Progress, RunLog, Runner, RunSpec
from learned_optim.meta.statistics import LAST_STEPS
from learned_optim.meta.tasks import Task, TaskFamily, as_family


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what, and how thoroughly."""

    checkpoints: tuple[str, ...] = ("default",)
    """Shipped names, files or Hub ids of learned optimizers; they run at lr = 1."""
    tasks: tuple[str, ...] = ("digits",)
    """Registered task names."""
    baselines: tuple[str, ...] = ("sgd", "nesterov", "rmsprop", "adam")
    """Hand-written optimizers, tuned per task."""
    horizons: tuple[int, ...] = (100, 200)
    """Numbers of steps to report; runs are as long as the largest."""
    seeds: int = 10
    """Test seeds."""
    tuning_seeds: int = 3
    """Seeds on which the baselines' learning rates are chosen; never those of the test."""
    output: Path = Path("evaluation")
    """Folder for the runs, the table and the plots."""
    workers: int = 1
    """Processes; each computes on one thread."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if not self.tasks or not self.horizons or not (self.checkpoints or self.baselines):
            raise ValueError("evaluate needs at least one task, one horizon and one optimizer")
        for name in ("checkpoints", "tasks", "baselines", "horizons"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice: {', '.join(map(str, given))}")
        if min(self.horizons) < LAST_STEPS:
            raise ValueError(f"horizons must be at least {LAST_STEPS}, got {self.horizons}")
        if self.seeds < 2 or self.tuning_seeds < 1:
            raise ValueError(
                f"seeds must be at least 2 (intervals) and tuning_seeds at least 1, "
                f"got {self.seeds} and {self.tuning_seeds}"
            )

    @property
    def length(self) -> int:
        """Steps of every run."""
        return max(self.horizons)


class Evaluation:
    """Carries out an :class:`EvaluateConfig`; finished runs are kept in ``output/runs.jsonl``.

    Args:
        config: what to evaluate.
        progress: told ``(runs done, runs in all, what)``.
        tasks: tasks of one's own, by the names that ``config.tasks`` has for them. With several
            workers they must be fit for pickling.

    Raises:
        ValueError: an unknown checkpoint, task or baseline (the message lists those that exist),
            a task whose images meta-trained a checkpoint, the runs in ``output`` were made under
            another torch, text or source of tasks, or ``tasks`` do not suit ``config``.
        FileNotFoundError: a checkpoint file or a task's data is not there.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        progress: Progress | None = None,
        *,
        tasks: Mapping[str, Task | TaskFamily] | None = None,
    ) -> None:
        self.config = config
        self._given = {name: as_family(task) for name, task in (tasks or {}).items()}
        _check_given(self._given, config)
        self._progress = progress or (lambda done, total, what: None)
        self.optimizers = runs.optimizer_specs(config.checkpoints, config.baselines)
        registered = [name for name in config.tasks if name not in self._given]
        # An unknown task, missing data or a leak fails here, not hours later.
        check_blind(config.checkpoints, registered, config.data)
        conditions = provenance.conditions(registered, config.data)
        for name, family in self._given.items():
            conditions |= provenance.conditions_of_given(name, family)
        self._conditions = provenance.check(config.output, conditions)
        self._log = RunLog(config.output / "runs.jsonl")

    def execute(self) -> dict[str, Any]:
        """Tune, test, and summarize.

        Returns:
            The summary that :mod:`learned_optim.meta.report` draws; also in ``summary.json``.
        """
        config = self.config
        provenance.remember(config.output, self._conditions)
        tuning = [
            spec
            for task in config.tasks
            for optimizer in self.optimizers
            if optimizer.kind == "baseline"
            for lr in _grid(optimizer)
            for spec in self._tuning_runs(task, optimizer, lr)
        ]
        with self._runner() as runner:
            runner.run_missing(tuning, "tuning")
            # Where a tuned learning rate diverges, the next best one is tested too.
            while tests := self._missing_tests():
                runner.run_missing(tests, "testing")
        summary = self.summary()
        write_text(config.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def refresh(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Replace learned optimizers that changed in a summary of the same tasks and seeds.

        Hand-written optimizers keep their figures; only the best of each table run again, with the
        learning rates found before, because ratios are taken seed by seed.

        Raises:
            ValueError: the summary is of another protocol, or what ran again gave other losses.
        """
        config, rules = self.config, self._protocol_dict()
        for name, value in rules.items():
            if name != "checkpoints" and summary["protocol"].get(name) != value:
                raise ValueError(
                    f"the summary has {name}={summary['protocol'].get(name)} and this evaluation "
                    f"{value}: evaluate anew"
                )
        learned = [c for c in self.optimizers if c.kind == "learned"]
        known = summary["protocol"]["checkpoints"]
        changed = [c for c in learned if known.get(c.label) != c.identity]
        cells, entries = {}, []
        for task in config.tasks:
            for horizon in config.horizons:
                old = summary["tasks"][task]["horizons"][str(horizon)]
                mine = [self._at(task, c, 1.0, horizon) for c in changed]
                best = self._known_best(task, old, horizon, "sum")
                final = self._known_best(task, old, horizon, "final")
                cells[task, horizon] = mine, best, final
                entries += [*mine, best, final]
        with self._runner() as runner:
            runner.run_missing([spec for e in entries for spec in e.specs], "testing")
        tasks: dict[str, Any] = {task: {"horizons": {}} for task in config.tasks}
        for (task, horizon), (mine, best, final) in cells.items():
            old = summary["tasks"][task]["horizons"][str(horizon)]
            row = old["optimizers"][best.optimizer.label]
            again = best.row()["sum"]["mean"]
            # Another processor rounds otherwise, and the runs drift apart, within their spread.
            spread = row["sum"]["half"]
            if not math.isclose(again, row["sum"]["mean"], rel_tol=1e-4, abs_tol=spread):
                raise ValueError(
                    f"{best.optimizer.label} on {task} has a summed loss of {again} now, and "
                    f"{row['sum']['mean']} in the summary: evaluate anew"
                )
            kept = {k: r for k, r in old["optimizers"].items() if r["kind"] == "baseline"}
            # What is timed beside each other is compared: not with another machine's time.
            for entry in (best, final):
                time = entry.row()["milliseconds_per_step"]
                name = entry.optimizer.label
                kept[name] = {**kept[name], "milliseconds_per_step": time}
            new = {
                e.optimizer.label: e.row() | e.ratios(best) | e.time_to_target(final) for e in mine
            }
            every = {c.label: new.get(c.label) or old["optimizers"][c.label] for c in learned}
            tasks[task]["horizons"][str(horizon)] = {**old, "optimizers": {**every, **kept}}
        return {**summary, "protocol": rules, "tasks": tasks}

    def _at(
        self,
        task: str,
        optimizer: OptimizerSpec,
        lr: float,
        horizon: int,
        by: str = "sum",
        tuned_lr: float | None = None,
    ) -> Result:
        steps = horizon if optimizer.anneals else self.config.length
        specs = self._test_runs(task, optimizer, lr, steps)
        best = lr if tuned_lr is None else tuned_lr
        return Result(optimizer, lr, best, horizon, by, specs, self._log.runs)

    def _known_best(self, task: str, cell: dict[str, Any], horizon: int, by: str) -> Result:
        """The best hand-written optimizer of a summary's table, as it ran for it."""
        name = cell["best_baseline" if by == "sum" else "best_final_baseline"]
        row = cell["optimizers"][name]
        lr = row["lr"] if by == "sum" else row["tuned_by_final"]["lr"]
        optimizer = next(c for c in self.optimizers if c.label == name)
        return self._at(task, optimizer, lr, horizon, by)

    def _missing_tests(self) -> list[RunSpec]:
        """All test runs that are asked for now, if one of them has still to be done."""
        tests = [s for task in self.config.tasks for e in self._entries(task) for s in e.specs]
        return tests if any(s.key not in self._log.runs for s in tests) else []

    def _tuning_runs(self, task: str, optimizer: OptimizerSpec, lr: float) -> list[RunSpec]:
        seeds, steps = range(self.config.tuning_seeds), self.config.length
        return [RunSpec(task, optimizer, lr, "tune", seed, steps) for seed in seeds]

    def _runner(self) -> Runner:
        config = self.config
        perform = partial(runs.run, families=self._given) if self._given else runs.run
        return Runner(self._log, config.data, config.workers, self._progress, perform)

    # ---- choosing learning rates, and the figures

    def ranked_lrs(
        self, task: str, optimizer: OptimizerSpec, horizon: int, by: str = "sum"
    ) -> list[float]:
        """Learning rates by their mean over tuning seeds, best first.

        Those that diverged there are left out, unless all of them did.

        Args:
            by: ``"sum"``, the loss summed over ``horizon``; ``"final"``, its mean over the last
                :data:`LAST_STEPS` of them.
        """

        def score(lr: float) -> float:
            done = [self._log.runs[spec.key] for spec in self._tuning_runs(task, optimizer, lr)]
            considered = slice(0 if by == "sum" else horizon - LAST_STEPS, horizon)
            return sum(sum(run.losses[considered]) for run in done)

        scores = {lr: score(lr) for lr in _grid(optimizer)}
        ranked = sorted(scores, key=scores.__getitem__)
        return [lr for lr in ranked if math.isfinite(scores[lr])] or ranked[:1]

    def _entries(self, task: str) -> list[Result]:
        """Who runs how on a task; test runs that several of them need are run once."""
        return [
            self._entry(task, optimizer, horizon, by)
            for horizon in self.config.horizons
            for optimizer in self.optimizers
            for by in (("sum",) if optimizer.kind == "learned" else ("sum", "final"))
        ]

    def _entry(self, task: str, optimizer: OptimizerSpec, horizon: int, by: str) -> Result:
        """One optimizer at one horizon, with its best learning rate that does not diverge.

        A run that has not been done yet counts as one that does not.
        """
        learned = optimizer.kind == "learned"
        lrs = [1.0] if learned else self.ranked_lrs(task, optimizer, horizon, by)
        choices = [self._at(task, optimizer, lr, horizon, by, tuned_lr=lrs[0]) for lr in lrs]
        return next((e for e in choices if not e.diverges()), choices[0])

    def _test_runs(
        self, task: str, optimizer: OptimizerSpec, lr: float, steps: int
    ) -> list[RunSpec]:
        seeds = range(self.config.seeds)
        return [RunSpec(task, optimizer, lr, "test", seed, steps) for seed in seeds]

    def summary(self) -> dict[str, Any]:
        """Every figure, by task, horizon and optimizer, with 95 % intervals."""
        tasks = {task: self._task_summary(task) for task in self.config.tasks}
        return {"protocol": self._protocol_dict(), "tasks": tasks}

    def _protocol_dict(self) -> dict[str, Any]:
        """The protocol, as the summary states it."""
        config = self.config
        return {
            "checkpoints": {c.label: c.identity for c in self.optimizers if c.kind == "learned"},
            "baselines": list(config.baselines),
            "horizons": list(config.horizons),
            "seeds": config.seeds,
            "tuning_seeds": config.tuning_seeds,
            "lr_grid": list(LR_GRID),
            "torch": torch.__version__.split("+")[0],
        }

    def _task_summary(self, task: str) -> dict[str, Any]:
        by_horizon: dict[str, Any] = {}
        entries = self._entries(task)
        for horizon in self.config.horizons:
            here = [e for e in entries if e.horizon == horizon]
            best = best_baseline(here, "sum")
            best_final = best_baseline(here, "final")
            rows = {}
            for entry in here:
                if entry.by == "sum":
                    compared = entry.ratios(best) if best else {}
                    reached = entry.time_to_target(best_final) if best_final else {}
                    rows[entry.optimizer.label] = entry.row() | compared | reached
                else:
                    rows[entry.optimizer.label]["tuned_by_final"] = entry.row()
            by_horizon[str(horizon)] = {
                "optimizers": rows,
                "best_baseline": best.optimizer.label if best else None,
                "best_final_baseline": best_final.optimizer.label if best_final else None,
            }
        return {"horizons": by_horizon}


def _check_given(tasks: Mapping[str, TaskFamily], config: EvaluateConfig) -> None:
    idle = [name for name in tasks if name not in config.tasks]
    if idle:
        raise ValueError(f"tasks has {', '.join(idle)}, which config.tasks does not name")
    for name, family in tasks.items():
        check_family(family, name)
    if config.workers > 1:
        try:
            pickle.dumps(tasks)
        except Exception as error:  # whatever an object of the user's raises
            raise ValueError(
                f"workers={config.workers} need tasks that can be sent to other processes, and "
                f"these cannot ({error}): make them of functions and classes of a module, or set "
                f"workers=1"
            ) from error


def _grid(optimizer: OptimizerSpec) -> tuple[float, ...]:
    """Learning rates that a baseline is tuned over: its only one, if it is a rival's constant."""
    fixed = baseline(optimizer.source).lr
    return LR_GRID if fixed is None else (fixed,)
