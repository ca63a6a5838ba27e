"""The field: tasks that people recognise, each trained for its stated number of steps.

It asks what a user asks: is an optimizer, untuned, better than AdamW with a warm-up and a cosine
that was tuned a little, and better than rivals that promise no tuning? Baselines without a
learning rate of their own are tuned per task by the final loss on tuning seeds; the figures come
from other seeds. Where the learning rate so chosen diverges on one of those, the next best takes
its place, in the baseline's favour. Everything else runs as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from learned_optim.checkpoint import write_text
from learned_optim.meta import provenance, runs
from learned_optim.meta.baselines import BASELINES, baseline, make_baseline, why_missing
from learned_optim.meta.checks import check_finite
from learned_optim.meta.data import DataOptions
from learned_optim.meta.field_summary import Figures, final_loss, summarize
from learned_optim.meta.leaks import check_blind
from learned_optim.meta.runs import (
    MakeOptimizer,
    OptimizerSpec,
    Progress,
    Run,
    RunLog,
    Runner,
    RunSpec,
    learned_optimizer,
    train,
)
from learned_optim.meta.seeding import seeded
from learned_optim.meta.statistics import pooled
from learned_optim.meta.tasks import TaskOptions, build_tasks, field_horizon, field_tasks

#: Learning rates over which baselines are tuned on the field.
FIELD_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: A run's losses are kept as means over this many equal stretches of its steps.
STRETCHES = 100
#: Rivals that need no tuning, each at its authors' constants.
UNTUNED = tuple(name for name, found in BASELINES.items() if found.lr is not None)
#: Rivals that the quick tier leaves out, for they are close relatives of others.
NOT_QUICK = ("prodigy", "dadapt-adam", "muon-cosine-2e-2", "soap-cosine-3e-3")
#: Rivals that are tuned per task.
TUNED = ("adamw-cosine", "adamw-linear", "muon-cosine", "soap-cosine", "schedulefree")


@dataclass(frozen=True)
class FieldConfig:
    """What to run on the field."""

    checkpoints: tuple[str, ...] = ("default",)
    """Shipped names, files or Hub ids of learned optimizers; they run at lr = 1."""
    tasks: tuple[str, ...] = ()
    """Tasks of the field; all of them if not given."""
    baselines: tuple[str, ...] = ()
    """Rivals, tuned and untuned; the tier's usual ones if not given."""
    quick: bool = False
    """The quick tier: fewer steps, seeds and rivals."""
    seeds: int = 0
    """Test seeds; 3, or 2 in the quick tier, if not given."""
    tuning_seeds: int = 1
    """Seeds on which learning rates are chosen; never those of the test."""
    output: Path = Path("field")
    """Folder for the runs, the tables and the plot."""
    workers: int = 1
    """Processes; each computes on one thread."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        for name in ("checkpoints", "tasks", "baselines"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice: {', '.join(map(str, given))}")
        for name, least in (("seeds", 0), ("tuning_seeds", 1), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def filled(self) -> FieldConfig:
        """This configuration with the tier's usual values where nothing is given."""
        left_out = NOT_QUICK if self.quick else ()
        return replace(
            self,
            tasks=self.tasks or tuple(field_tasks()),
            baselines=self.baselines or tuple(b for b in (*TUNED, *UNTUNED) if b not in left_out),
            seeds=self.seeds or (2 if self.quick else 3),
        )


def run_pooled(spec: RunSpec, data: DataOptions) -> Run:
    """A run whose losses are means over :data:`STRETCHES` stretches, so that memory is bounded."""
    finished = runs.run(spec, data)
    return replace(finished, losses=pooled(finished.losses, STRETCHES))


class FieldEvaluation:
    """Carries out a :class:`FieldConfig`; finished runs are kept in ``output/runs.jsonl``.

    Args:
        config: what to run.
        progress: told ``(runs done, runs in all, what)``; ``what`` has the time left.

    Raises:
        ValueError: an unknown task, checkpoint or baseline (the message lists those that exist), a
            task that cannot be trained, or runs in ``output`` made under other conditions.
        FileNotFoundError: a checkpoint file, a text or a task's images are not there.
    """

    def __init__(self, config: FieldConfig, progress: Progress | None = None) -> None:
        self.config = config = config.filled()
        self._show = progress or (lambda done, total, what: None)
        missing = {name: why_missing(name) for name in config.baselines}
        #: Why rivals do not take part, by name.
        self.skipped = {name: why for name, why in missing.items() if why}
        present = [name for name in config.baselines if name not in self.skipped]
        self.optimizers = runs.optimizer_specs(config.checkpoints, present)
        if not self.optimizers:
            raise ValueError("the field needs at least one optimizer whose package is installed")
        self.steps = {
            task: field_horizon(task).quick if config.quick else field_horizon(task).steps
            for task in config.tasks
        }
        for index, task in enumerate(config.tasks):
            self._show(index, len(config.tasks), f"checking {task}")
            family = build_tasks(task, TaskOptions("evaluation", config.data))
            check_finite(family.sample(seeded("check", task)), task)
        check_blind(config.checkpoints, config.tasks, config.data)
        self._conditions = provenance.check(
            config.output, provenance.conditions(config.tasks, config.data)
        )
        self._log = RunLog(config.output / "runs.jsonl")
        self._planned: list[RunSpec] = []

    def execute(self) -> dict[str, Any]:
        """Tune, test, and summarize.

        Returns:
            The summary that :mod:`learned_optim.meta.field_report` draws; also in
            ``summary.json``.
        """
        config = self.config
        provenance.remember(config.output, self._conditions)
        self._planned = self._specs()
        with Runner(self._log, config.data, config.workers, self._progress, run_pooled) as runner:
            runner.run_missing(self._planned, "tuning and testing")
            # Where a tuned learning rate diverges, the next best one is tested too.
            while tests := self._missing_tests():
                self._planned = tests
                runner.run_missing(tests, "testing")
        summary = self.summary()
        write_text(config.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def summary(self) -> dict[str, Any]:
        """Every figure of the finished runs."""
        config = self.config
        figures = {
            task: {
                optimizer.label: Figures.of(
                    optimizer,
                    lr := self._lr(task, optimizer),
                    self.steps[task],
                    [self._log.runs[s.key] for s in self._test_runs(task, optimizer, lr)],
                )
                for optimizer in self.optimizers
            }
            for task in config.tasks
        }
        tuned = [o.label for o in self.optimizers if _is_tuned(o)]
        untuned = [o.label for o in self.optimizers if not _is_tuned(o)]
        protocol = {
            "suite": "field",
            "quick": config.quick,
            "checkpoints": {o.label: o.identity for o in self.optimizers if o.kind == "learned"},
            "tuned": tuned,
            "untuned": untuned,
            "skipped": self.skipped,
            "seeds": config.seeds,
            "tuning_seeds": config.tuning_seeds,
            "lr_grid": list(FIELD_LRS),
            "torch": torch.__version__.split("+")[0],
        }
        return {"protocol": protocol, **summarize(figures, tuned, untuned)}

    # ---- which runs

    def _specs(self) -> list[RunSpec]:
        """What can be run at once: tuning runs, and tests of everything untuned.

        The first run of every task comes before the second of any: what is wrong shows early, and
        the time left is known.
        """
        tuned = [o for o in self.optimizers if _is_tuned(o)]
        untuned = [o for o in self.optimizers if not _is_tuned(o)]
        tests = [
            self._test_runs(task, optimizer, self._lr(task, optimizer))[seed]
            for seed in range(self.config.seeds)
            for optimizer in untuned
            for task in self.config.tasks
        ]
        tuning = [
            spec
            for optimizer in tuned
            for lr in FIELD_LRS
            for task in self.config.tasks
            for spec in self._tuning_runs(task, optimizer, lr)
        ]
        return tests + tuning

    def _missing_tests(self) -> list[RunSpec]:
        """All test runs at the learning rates that are chosen now, if one has still to be done."""
        tests = [
            spec
            for optimizer in self.optimizers
            for task in self.config.tasks
            for spec in self._test_runs(task, optimizer, self._lr(task, optimizer))
        ]
        return tests if any(s.key not in self._log.runs for s in tests) else []

    def _test_runs(self, task: str, optimizer: OptimizerSpec, lr: float) -> list[RunSpec]:
        steps = self.steps[task]
        seeds = range(self.config.seeds)
        return [RunSpec(task, optimizer, lr, "test", seed, steps) for seed in seeds]

    def _tuning_runs(self, task: str, optimizer: OptimizerSpec, lr: float) -> list[RunSpec]:
        steps = self.steps[task]
        seeds = range(self.config.tuning_seeds)
        return [RunSpec(task, optimizer, lr, "tune", seed, steps) for seed in seeds]

    def _lr(self, task: str, optimizer: OptimizerSpec) -> float:
        """The learning rate of an optimizer's test runs: its own, or the best that is alive."""
        if not _is_tuned(optimizer):
            own = 1.0 if optimizer.kind == "learned" else baseline(optimizer.source).lr
            assert own is not None
            return own

        def score(lr: float) -> float:
            specs = self._tuning_runs(task, optimizer, lr)
            return sum(final_loss(self._log.runs[spec.key]) for spec in specs)

        def diverges(lr: float) -> bool:
            specs = self._test_runs(task, optimizer, lr)
            done = [self._log.runs[s.key] for s in specs if s.key in self._log.runs]
            return any(math.isinf(run.losses[-1]) for run in done)

        ranked = sorted(FIELD_LRS, key=score)
        return next((lr for lr in ranked if not diverges(lr)), ranked[0])

    def _progress(self, done: int, total: int, what: str) -> None:
        self._show(done, total, f"{what}, {self._time_left()} left")

    def _time_left(self) -> str:
        """An estimate for the planned runs, from the processor time of finished ones.

        A run is taken to be as long as the mean one of the same task and kind of optimizer, or,
        if there is none yet, as the mean of all.
        """
        known: dict[tuple[str, str], list[float]] = {}
        waiting = []
        for spec in self._planned:
            finished, like = self._log.runs.get(spec.key), (spec.task, spec.optimizer.kind)
            if finished is None:
                waiting.append(like)
            elif math.isfinite(finished.seconds):
                known.setdefault(like, []).append(finished.seconds)
        if not known:
            return "unknown time"
        means = {like: sum(seconds) / len(seconds) for like, seconds in known.items()}
        usual = sum(means.values()) / len(means)
        minutes = sum(means.get(like, usual) for like in waiting) / self.config.workers / 60.0
        return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def _is_tuned(optimizer: OptimizerSpec) -> bool:
    """Whether an optimizer's learning rate is chosen per task."""
    return optimizer.kind == "baseline" and baseline(optimizer.source).lr is None


def measure(
    optimizers: Mapping[str, MakeOptimizer | str],
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    quick: bool = True,
    data: DataOptions | None = None,
) -> dict[tuple[str, str, int], float]:
    """Final training losses of optimizers on the field, in this process, without a log.

    For trying things out; :class:`FieldEvaluation` is the protocol.

    Args:
        optimizers: by label, functions ``(parameters, total steps) -> optimizer``, or one of
            ``"baseline:NAME"``, ``"baseline:NAME@LR"`` and a checkpoint's name or file.
        tasks: names of the field; all of them if not given.
        seeds: test seeds.
        quick: take the quick tier's steps.
        data: where images and texts are.

    Returns:
        By task, label and seed; infinite for a run that diverged.
    """
    makers = {
        label: _maker(made) if isinstance(made, str) else made for label, made in optimizers.items()
    }
    found = {}
    for task in tasks or field_tasks():
        steps = field_horizon(task).quick if quick else field_horizon(task).steps
        for label, make in makers.items():
            for seed in seeds:
                run = train(task, make, "test", seed, steps, data or DataOptions())
                found[task, label, seed] = final_loss(run)
    return found


def _maker(text: str) -> MakeOptimizer:
    """An optimizer of :func:`measure` from its name."""
    if not text.startswith("baseline:"):
        return lambda params, total_steps: learned_optimizer(params, text, total_steps)
    name, _, given = text.removeprefix("baseline:").partition("@")
    lr = float(given) if given else baseline(name).lr
    if lr is None:
        raise ValueError(f"the baseline {name!r} has no learning rate of its own: say {name}@LR")
    return lambda params, total_steps: make_baseline(name, params, lr, total_steps)
