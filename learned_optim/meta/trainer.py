"""Meta-training by unrolls: epochs of runs, validation, and a run folder that survives a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from learned_optim.checkpoint import CheckpointError, read_checkpoint, save_rule
from learned_optim.meta import provenance
from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.progress import (
    EpochMetrics,
    Pace,
    Report,
    TrainingError,
    event_writer,
    seconds_left,
)
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.run_folder import RunFolder, source_modules
from learned_optim.meta.tasks import TaskFamily, TaskOptions, build_tasks
from learned_optim.meta.unrolls import Ranks, train_run
from learned_optim.meta.validation import Validator
from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for

#: What has helped where training diverged.
ADVICE = "Lower --meta-lr, or clip with --clip-norm"


@dataclass(frozen=True)
class TrainConfig:
    """Meta-train an update rule; an interrupted run goes on when started again."""

    recipe: Recipe
    folder: Path = Path("runs")
    """Run folder: metrics, best checkpoint, resume state."""
    output: Path | None = None
    """Where the finished checkpoint goes; into the run folder if not given."""
    threads: int = 1
    """Threads of torch: more change the last bits, and hardly the time, of small optimizees."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    against_adamw: bool = True
    """Report validation relative to AdamW, which is tuned on its runs before training."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where image sets are looked for."""


class MetaTrainer:
    """Runs a recipe in a folder; a second trainer on the same folder goes on where it stopped.

    The folder holds ``recipe.json``, ``protocol.json`` (versions, and the source of a task or rule
    of one's own), ``metrics.jsonl`` (one line per epoch), ``references.json`` (tuned AdamW on the
    validation runs), ``best.safetensors`` (best by validation) and ``resume.pt``. A kill loses at
    most the current epoch, and a resumed run gives the same bits as an uninterrupted one.

    Under ``torchrun``, ranks share the tasks of every meta-step and average their meta-gradients;
    or, with the estimators ``es`` and ``pes``, the pairs of perturbations, and exchange fitness.

    Args:
        recipe: what to train.
        folder: the run folder, created if needed.
        data: where image sets are looked for.
        tensorboard: also write the metrics as TensorBoard events into the folder.
        family: the tasks, if ``recipe.task`` is no registered name: see
            :func:`~learned_optim.meta.meta_train`.
        test_family: those for the figures in the checkpoint; if not given, ``recipe.test_task``'s
            or, without one, ``family``.
        against_adamw: tune AdamW on the validation runs before training, and report validation as
            a ratio to it.

    Raises:
        ValueError: the task cannot be meta-trained on (:func:`check_family`); the folder belongs to
            a run of another recipe, torch, release or source of tasks, or is damaged; or the
            checkpoint to start from belongs to another rule or to one of other sizes.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: DataOptions | None = None,
        tensorboard: bool = False,
        *,
        family: TaskFamily | None = None,
        test_family: TaskFamily | None = None,
        against_adamw: bool = True,
    ) -> None:
        self.recipe, self.folder, self.tensorboard = recipe, Path(folder), tensorboard
        self.against_adamw = against_adamw
        self.data = data or DataOptions()
        self.files = RunFolder(self.folder)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.ranks = Ranks(self.rank, self.world, recipe.perturbs)
        if recipe.perturbs and recipe.pairs < self.world:
            raise ValueError(
                f"pairs={recipe.pairs} leave some of {self.world} ranks nothing to do: give each "
                f"one at least"
            )
        if recipe.tasks_per_meta_step % self.ranks.task_world:
            raise ValueError(
                f"tasks_per_meta_step={recipe.tasks_per_meta_step} cannot be shared evenly by "
                f"{self.world} ranks: make it a multiple"
            )
        if self.rank > 0:
            self.meet()  # rank 0 downloads what is missing, alone
        self._given = family
        self.family = family or build_tasks(recipe.task, TaskOptions("meta", self.data))
        self._test_family = test_family
        if test_family is None and recipe.test_task is None:
            self._test_family = family
        elif test_family is None:  # missing data fails now, not after the training
            build_tasks(self._test_task, TaskOptions("evaluation", self.data))
        if self.rank == 0:
            self.meet()
        check_family(self.family, recipe.task)
        if test_family is not None and test_family is not family:  # now, not after the training
            check_family(test_family, f"{recipe.task} (test)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.rule = rule_for(recipe.rule)
            self.kept = rule_for(recipe.rule)  # the moving average: what is validated and saved
        if recipe.estimator == "replay" and self.rule.rows == "none":
            raise ValueError(
                f"estimator 'replay' needs a rule that splits into observation and response, and "
                f"{self.rule.name!r} does not: use estimator='autograd' (--estimator autograd)"
            )
        for rule in (self.rule, self.kept):  # what evaluation measures is what users get
            rule.warmup_steps, rule.trained_steps = 0, recipe.longest_run
        self._start: str | None = None  # fingerprint of the weights before training, if learned
        if recipe.start is not None:
            self._start_from(recipe.start)
        self.kept.load_state_dict(self.rule.state_dict())
        self.meta_optimizer = MetaOptimizer(recipe, self.rule, self.kept)
        self.validator = Validator(recipe, self.family, self.rank, self.world)
        self.pace = Pace()  # of the present epoch
        self.epoch = 0
        self.history: list[EpochMetrics] = []
        self._open_folder()

    def _start_from(self, source: str) -> None:
        start = load_rule(source)
        try:
            self.rule.init_from(start)
        except ValueError as error:
            raise ValueError(f"start={source!r} does not fit the recipe: {error}") from error
        self._start = start.fingerprint()

    @property
    def _test_task(self) -> str:
        return self.recipe.test_task or self.recipe.task

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch with the smallest validation."""
        return min(self.history, key=lambda m: m.validation, default=None)

    @property
    def meta_steps(self) -> int:
        """Meta-steps done."""
        return self.meta_optimizer.steps

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    # ---- the run folder

    def _open_folder(self) -> None:
        recipe = self.recipe
        classes = (type(self.rule), type(recipe.rule))
        named = [recipe.task] if self._given is None else []
        if self._test_family is None and self._test_task not in named:
            named.append(self._test_task)
        conditions = provenance.conditions(named, self.data, source_modules(*classes))
        conditions |= provenance.conditions_of_main(*classes)
        if self._given is not None:
            conditions |= provenance.conditions_of_given(recipe.task, self._given)
        if self._start is not None:
            conditions["weights of start"] = self._start
        conditions = self.files.check(recipe, conditions)
        saved = self.files.read_state()
        if saved is not None:
            self._load(saved)
        self.validator.load_adamw(self.folder)
        if self.rank == 0:
            self.files.begin(recipe, conditions)

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            ranks = saved.get("ranks", self.world)
            self.rule.load_state_dict(saved["rule"])
            self.kept.load_state_dict(saved["kept"])
            self.meta_optimizer.adam.load_state_dict(saved["meta_optimizer"])
            self.epoch, self.meta_optimizer.steps = saved["epoch"], saved["meta_steps"]
            self.history = [EpochMetrics(**line) for line in saved["history"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self.files.damaged(error) from error
        sampled = self.recipe.coordinates is not None and not self.recipe.perturbs
        if ranks != self.world and sampled:
            raise ValueError(
                f"{self.folder} holds a run of {ranks} ranks, and each draws its own sample of "
                f"coordinates: resume it with as many, not {self.world}"
            )

    def _save(self) -> None:
        """Best checkpoint first, resume state last: a kill in between repeats the epoch."""
        if self.rank != 0:
            return
        if self.best is self.history[-1]:
            save_rule(self.kept, self.files.best, self.record())
        history = [asdict(metrics) for metrics in self.history]
        state = {
            "rule": self.rule.state_dict(),
            "kept": self.kept.state_dict(),
            "meta_optimizer": self.meta_optimizer.adam.state_dict(),
            "epoch": self.epoch,
            "meta_steps": self.meta_steps,
            "ranks": self.world,
            "history": history,
        }
        self.files.write_state(state, history)

    def finish(self, output: Path | None = None, report: Report | None = None) -> Path:
        """Test the best weights on fresh tasks and write the finished checkpoint.

        Args:
            output: where to; into the run folder, and named after it, if not given.
            report: told ``("test", runs done, runs in all)``.

        Returns:
            The file written. Its record holds the recipe, the commit, and the validation and test
            figures; test tasks come from the evaluation split and choose nothing.

        Raises:
            TrainingError: no epoch has a finite validation, so that no weights are worth keeping.
            CheckpointError: the best checkpoint of the folder is damaged.
        """
        if self.best is None or not math.isfinite(self.best.validation):
            raise TrainingError(
                f"none of the {self.epoch} epochs in {self.folder} has a finite validation loss: "
                f"there are no weights worth keeping. {ADVICE}"
            )
        rule, record = self._best_rule()
        record["recipe"] = self.recipe.to_json()
        family = self._test_family
        if family is None:
            family = build_tasks(self._test_task, TaskOptions("evaluation", self.data))
        seeds = [(self.recipe.seed, "test", i) for i in range(self.recipe.test_runs)]
        sums = self.validator.sums(rule, family, seeds, "test", report)
        logs = sums.log()
        record["test"] = {
            "mean": sums.mean().item(),
            "std": sums.std().item(),
            "geometric_mean": logs.mean().exp().item(),
            "runs": len(sums),
            "task": self._test_task,
        }
        record |= {
            "epochs_run": self.epoch,
            "meta_steps": self.meta_steps,
            "data": self._data_read(),
            "torch": torch.__version__.split("+")[0],
        }
        path = output or self.files.finished
        save_rule(rule, path, record)
        return path

    def _data_read(self) -> str | dict[str, str]:
        """What the meta-training has read, for the checkpoint's header."""
        if self._given is None:
            return f"task family {self.recipe.task!r}, meta-training split alone"
        return provenance.conditions_of_given(self.recipe.task, self._given)

    def _best_rule(self) -> tuple[UpdateRule, dict[str, Any]]:
        try:
            return read_checkpoint(self.files.best)
        except (CheckpointError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{error}. To train again from epoch 1, delete the run folder {self.folder}"
            ) from error

    def record(self) -> dict[str, Any]:
        """How the kept weights were made, for the checkpoint's header."""
        best = self.best
        return {
            "recipe": self.recipe.to_json(),
            "commit": provenance.source_version(),
            "epoch": best.epoch if best else 0,
            "validation": best.validation if best else None,
            "ratio_to_adamw": best.ratio_to_adamw if best else None,
            "dropped_unrolls": sum(m.dropped for m in self.history),
            "data_sets": list(self.family.data_sets),
            **({"start": self._start} if self._start else {}),
        }

    # ---- training

    def train(
        self,
        on_run: Callable[[int, int, float], None] | None = None,
        report: Report | None = None,
    ) -> None:
        """Run the remaining epochs.

        Args:
            on_run: told ``(epoch, run, meta_loss)`` after every optimizee run.
            report: told ``("AdamW" or "validation", runs done, runs in all)``.

        Raises:
            TrainingError: every unroll of an epoch was dropped and its validation is not finite.
            ValueError: another process trains in the folder.
            OSError: a file cannot be written; the folder holds the last epoch before.
        """
        with self._alone(), event_writer(self.folder, self.tensorboard and self.rank == 0) as write:
            if self.against_adamw and not self._is_over():
                self.validator.tune_adamw(self.folder, report)
            while not self._is_over():
                self._train_epoch(self.epoch + 1, on_run, report)
                values = asdict(self.history[-1])
                write(values.pop("epoch"), values)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other trainings out of the folder; of several ranks, the first does."""
        if self.rank > 0:
            yield
        else:
            with self.files.locked():
                yield

    def _train_epoch(
        self,
        epoch: int,
        on_run: Callable[[int, int, float], None] | None,
        report: Report | None,
    ) -> None:
        started = time.perf_counter()
        sums, dropped, self.pace = [], 0, Pace()
        for run in range(self.recipe.runs_per_epoch):
            with self.pace.counting(self.recipe.tasks_per_meta_step):
                meta_loss, lost = self._train_run(epoch, run)
            sums.append(meta_loss)
            dropped += lost
            if on_run is not None:
                on_run(epoch, run, meta_loss)
        finite = [s for s in sums if math.isfinite(s)]
        validation = self.validate(report=report)
        if not finite and not math.isfinite(validation):
            raise TrainingError(
                f"epoch {epoch} taught nothing: all of its {dropped} unrolls met a loss or a "
                f"gradient that is not finite, and so did validation. {ADVICE}. {self.folder} "
                f"holds the {self.epoch} epochs before"
            )
        previous = self.best.validation if self.best else math.inf
        seconds = time.perf_counter() - started
        metrics = EpochMetrics(
            epoch=epoch,
            meta_loss=sum(finite) / len(finite) if finite else math.inf,
            validation=validation,
            best=min(previous, validation),
            dropped=dropped,
            meta_lr=self.meta_optimizer.adam.param_groups[0]["lr"],
            seconds=seconds,
            ratio_to_adamw=self.validator.ratio_to_adamw(validation),
            runs_per_second=self.pace.per_second,
            seconds_left=seconds_left(
                [*(m.seconds for m in self.history), seconds], self.recipe.epochs - epoch
            ),
        )
        self.epoch = epoch
        self.history.append(metrics)
        self._save()

    def _is_over(self) -> bool:
        """Whether all epochs are done, or too many without a better validation."""
        best, patience = self.best, self.recipe.patience
        if best is not None and patience is not None and self.epoch - best.epoch >= patience:
            return True
        return self.epoch >= self.recipe.epochs

    def _train_run(self, epoch: int, run: int) -> tuple[float, int]:
        return train_run(self.recipe, self.family, self.meta_optimizer, self.ranks, epoch, run)

    def validate(self, rule: UpdateRule | None = None, report: Report | None = None) -> float:
        """Mean summed loss over the validation runs, of the kept weights unless a rule is given.

        Infinite if it is not finite. All ranks must take part.

        Args:
            rule: whose loss, if not that of the kept weights.
            report: told ``("validation", runs done, runs in all)``.
        """
        return self.validator.mean(rule or self.kept, report)
