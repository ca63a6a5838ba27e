"""The evaluation protocol: learned optimizers, untuned, against hand-written ones.

It asks what a user asks: is an optimizer, untuned, better than AdamW with a warm-up and a cosine
that was tuned a little, and better than rivals that promise no tuning? Per seed, all optimizers
start from the same weights and see the same batches. A baseline without a learning rate of its own
is tuned per task on tuning seeds; the figures come from other seeds. Where the chosen rate
diverges on one of those, the next best takes its place, in the baseline's favour. Learned
optimizers run at their defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from learned_optim.checkpoint import write_text
from learned_optim.evaluation import runs
from learned_optim.evaluation.baselines import BASELINES, LR_GRID, baseline, why_missing
from learned_optim.evaluation.figures import Figures, final_loss, summarize
from learned_optim.evaluation.runs import (
    OptimizerSpec,
    Phase,
    Progress,
    Run,
    RunLog,
    RunSpec,
    run_missing,
)
from learned_optim.evaluation.statistics import worth_by_group
from learned_optim.meta import provenance
from learned_optim.meta.checks import check_family, check_finite, check_picklable
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import (
    Task,
    TaskFamily,
    TaskOptions,
    as_family,
    build_tasks,
    field_steps,
    field_tasks,
)
from learned_optim.pretrained import load_record

#: Learning rates over which baselines are tuned on the field.
FIELD_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Rivals that need no tuning, each at its authors' constants.
UNTUNED = tuple(name for name, found in BASELINES.items() if found.lr is not None)
#: Rivals that the quick tier leaves out, for they are close relatives of others.
NOT_QUICK = ("prodigy", "dadapt-adam", "muon-cosine-2e-2", "soap-cosine-3e-3")
#: Rivals that are tuned per task.
TUNED = ("adamw-cosine", "adamw-linear", "muon-cosine", "soap-cosine", "schedulefree")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what, and how thoroughly."""

    checkpoints: tuple[str, ...] = ("default",)
    """Shipped names, files or Hub ids of learned optimizers; they run at their defaults."""
    suite: Literal["short", "field"] = "short"
    """Usual values of what is not given: the thesis's short runs, or the field of real ones."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; quadratic and digits, or the whole field, if not given."""
    baselines: tuple[str, ...] = ()
    """Rivals, tuned and untuned; the suite's usual ones if not given."""
    told: bool = True
    """Whether learned optimizers are told the number of steps."""
    steps: int = 0
    """Steps of every run; 100, or the task's own number in the field, if 0."""
    quick: bool = False
    """The field's quick tier: fewer steps, seeds and rivals."""
    seeds: int = 0
    """Test seeds; 10, or in the field 3 (2 in the quick tier), if 0."""
    tuning_seeds: int = 0
    """Seeds on which learning rates are chosen, never those of the test; 3, or 1, if 0."""
    lrs: tuple[float, ...] = ()
    """Learning rates of tuned rivals; thirteen in 1e-5 to 10, or seven in 1e-4 to 1e-1."""
    output: Path = Path("evaluation")
    """Folder for the runs, the tables and the plots."""
    workers: int = 1
    """Processes; each computes on one thread."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        for name in ("checkpoints", "tasks", "baselines", "lrs"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice: {', '.join(map(str, given))}")
        for name, least in (("steps", 0), ("seeds", 0), ("tuning_seeds", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def filled(self) -> EvaluateConfig:
        """This configuration with the suite's usual values where nothing is given."""
        if self.suite == "short":
            usual: dict[str, Any] = {
                "tasks": ("quadratic", "digits"),
                "baselines": ("sgd", "nesterov", "rmsprop", "adam"),
                "steps": 100,
                "seeds": 10,
                "tuning_seeds": 3,
                "lrs": LR_GRID,
            }
        else:
            left_out = NOT_QUICK if self.quick else ()
            usual = {
                "tasks": tuple(field_tasks()),
                "baselines": tuple(b for b in (*TUNED, *UNTUNED) if b not in left_out),
                "seeds": 2 if self.quick else 3,
                "tuning_seeds": 1,
                "lrs": FIELD_LRS,
            }
        return replace(self, **{k: v for k, v in usual.items() if not getattr(self, k)})

    @property
    def tune_by(self) -> Literal["final", "sum"]:
        """The loss that chooses learning rates: summed in short runs, final in the field."""
        return "sum" if self.suite == "short" else "final"


class Evaluation:
    """Carries out an :class:`EvaluateConfig`; finished runs are kept in ``output/runs.jsonl``.

    Rivals whose package is missing and tasks whose data is missing are left out and named.

    Args:
        config: what to run.
        progress: told ``(runs done, runs in all, what)``.
        tasks: tasks of one's own, by the names that ``config.tasks`` has for them. With several
            workers they must be fit for pickling.

    Raises:
        ValueError: an unknown task, checkpoint or baseline (the message lists those that exist), a
            task that cannot be trained or whose images meta-trained a checkpoint, or runs in
            ``output`` made under other conditions.
        FileNotFoundError: a checkpoint file is not there, or the data of no task is.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        progress: Progress | None = None,
        *,
        tasks: Mapping[str, Task | TaskFamily] | None = None,
    ) -> None:
        config = config.filled()
        self._show = progress or (lambda done, total, what: None)
        self._given = {name: as_family(task) for name, task in (tasks or {}).items()}
        if idle := set(self._given) - set(config.tasks):
            raise ValueError(f"tasks has {', '.join(idle)}, which config.tasks does not name")
        for name, family in self._given.items():
            check_family(family, name)
        if config.workers > 1:
            check_picklable(self._given, config.workers)
        missing = {name: why_missing(name) for name in config.baselines}
        #: Why rivals and tasks do not take part, by name.
        self.skipped = {name: why for name, why in missing.items() if why}
        present = [name for name in config.baselines if name not in self.skipped]
        self.optimizers = runs.optimizer_specs(config.checkpoints, present, config.told)
        if not self.optimizers:
            raise ValueError("evaluate needs at least one optimizer whose package is installed")
        self.steps = {t: config.steps or field_steps(t, config.quick) for t in config.tasks}
        registered: dict[str, TaskFamily] = {}
        for index, task in enumerate(config.tasks):
            if task not in self._given:
                self._show(index, len(config.tasks), f"checking {task}")
                try:
                    registered[task] = build_tasks(task, TaskOptions("evaluation", config.data))
                except FileNotFoundError as error:
                    self.skipped[task] = str(error)
                    continue
                check_finite(registered[task].sample(seeded("check", task)), task)
        ready = tuple(task for task in config.tasks if task not in self.skipped)
        if not ready:
            raise FileNotFoundError(self.skipped[config.tasks[0]])
        self.config = config = replace(config, tasks=ready)
        check_blind(config.checkpoints, registered)
        conditions = provenance.conditions(list(registered), config.data)
        for name, family in self._given.items():
            conditions |= provenance.conditions_of_given(name, family)
        self._conditions = provenance.check(config.output, conditions)
        self._log = RunLog(config.output / "runs.jsonl")

    def execute(self) -> dict[str, Any]:
        """Tune, test, and summarize.

        Returns:
            The summary that :mod:`learned_optim.summary` draws; also in ``summary.json``.
        """
        config = self.config
        provenance.remember(config.output, self._conditions)
        perform = partial(runs.run, data=config.data, families=self._given)
        untuned = self._specs("test", tuned=False)
        wanted = untuned + self._specs("tune", tuned=True)
        run_missing(self._log, wanted, perform, self._show, config.workers)
        # Where a tuned learning rate diverges, the next best one is tested too.
        while self._log.lacks(wanted := untuned + self._specs("test", tuned=True)):
            run_missing(self._log, wanted, perform, self._show, config.workers)
        summary = self.summary()
        write_text(config.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _figures(self, task: str, optimizer: OptimizerSpec) -> Figures:
        lr = self._lr(task, optimizer)
        done = self._done(task, optimizer, lr, "test")
        return Figures.of(optimizer, lr, self.steps[task], done)

    def summary(self) -> dict[str, Any]:
        """Every figure of the finished runs."""
        config = self.config
        figures = {t: {o.label: self._figures(t, o) for o in self.optimizers} for t in config.tasks}
        tuned = [o.label for o in self.optimizers if o.tuned]
        untuned = [o.label for o in self.optimizers if not o.tuned]
        protocol = {
            "suite": config.suite,
            "quick": config.quick,
            "told": config.told,
            "checkpoints": {o.label: o.identity for o in self.optimizers if o.kind == "learned"},
            "tuned": tuned,
            "untuned": untuned,
            "skipped": self.skipped,
            "seeds": config.seeds,
            "tuning_seeds": config.tuning_seeds,
            "tune_by": config.tune_by,
            "lr_grid": list(config.lrs),
            "torch": torch.__version__.split("+")[0],
        }
        summarized = summarize(figures, tuned, untuned, config.tune_by)
        return {"protocol": protocol, **summarized, "worth": self._worth(figures)}

    def _worth(self, figures: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
        """Worth of a run of every learned optimizer in runs of every tuned rival."""
        tuning = {
            rival.label: {
                task: [self._tuned_loss(task, rival, lr) for lr in self._lrs(rival)]
                for task in figures
            }
            for rival in self.optimizers
            if rival.tuned
        }
        worth: dict[str, Any] = {}
        for name in (o.label for o in self.optimizers if o.kind == "learned"):
            losses = {task: row[name].final.mean().item() for task, row in figures.items()}
            worth[name] = {rival: worth_by_group(losses, rows) for rival, rows in tuning.items()}
        return worth

    # ---- which runs

    def _specs(self, phase: Phase, tuned: bool) -> list[RunSpec]:
        """Runs of all tuned or all untuned optimizers; tests are at their present rates.

        The first run of every task comes before the second of any: what is wrong shows early.
        """
        specs = [
            spec
            for optimizer in self.optimizers
            if optimizer.tuned == tuned
            for task in self.config.tasks
            for lr in (self._lrs(optimizer) if phase == "tune" else [self._lr(task, optimizer)])
            for spec in self._runs(task, optimizer, lr, phase)
        ]
        return sorted(specs, key=lambda spec: spec.seed)

    def _runs(self, task: str, optimizer: OptimizerSpec, lr: float, phase: Phase) -> list[RunSpec]:
        seeds = self.config.seeds if phase == "test" else self.config.tuning_seeds
        steps = self.steps[task]
        return [RunSpec(task, optimizer, lr, phase, seed, steps) for seed in range(seeds)]

    def _lrs(self, optimizer: OptimizerSpec) -> tuple[float, ...]:
        """The learning rates at which a rival is tuned."""
        own = baseline(optimizer.source).lrs if self.config.suite == "field" else ()
        return tuple(lr for lr in self.config.lrs if lr in own) or self.config.lrs

    def _done(self, task: str, optimizer: OptimizerSpec, lr: float, phase: Phase) -> list[Run]:
        """Those of the runs that are finished."""
        keys = [spec.key for spec in self._runs(task, optimizer, lr, phase)]
        return [self._log.runs[key] for key in keys if key in self._log.runs]

    def _tuned_loss(
        self, task: str, optimizer: OptimizerSpec, lr: float, by: str = "final"
    ) -> float:
        """Mean loss of the tuning runs at a learning rate."""
        done = self._done(task, optimizer, lr, "tune")
        losses = [final_loss(r) if by == "final" else sum(r.losses) / len(r.losses) for r in done]
        return sum(losses) / len(losses)

    def _lr(self, task: str, optimizer: OptimizerSpec) -> float:
        """The rate of an optimizer's test runs: its own, or the best that never diverged."""
        if optimizer.lr is not None:
            return optimizer.lr

        def diverges(lr: float) -> bool:
            return any(math.isinf(r.losses[-1]) for r in self._done(task, optimizer, lr, "test"))

        def loss(lr: float) -> float:
            return self._tuned_loss(task, optimizer, lr, self.config.tune_by)

        ranked = sorted(self._lrs(optimizer), key=loss)
        return next((lr for lr in ranked if not diverges(lr)), ranked[0])


def check_blind(checkpoints: Sequence[str], families: Mapping[str, TaskFamily]) -> None:
    """Refuse tasks that draw on images which meta-trained a checkpoint, by its record."""
    for checkpoint in checkpoints:
        trained_on = set(load_record(checkpoint).get("data_sets", ()))
        for name, family in families.items():
            shared = sorted(trained_on & set(family.data_sets))
            if shared and not family.halved:
                raise ValueError(
                    f"{checkpoint!r} was meta-trained on half of the {', '.join(shared)} images, "
                    f"and the task {name!r} draws on all of them: leave it out, or "
                    f"evaluate on '{shared[0]}-half', whose images it has not seen"
                )
