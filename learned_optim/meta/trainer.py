"""One meta-training: rounds, validation, and a run folder that survives a kill.

What happens in a round, and where its meta-gradients come from, is a :class:`Method`: an epoch of
optimizee runs cut into unrolls, or a meta-step of evolution strategies on whole runs.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from learned_optim._progress import ProgressBar
from learned_optim.checkpoint import CheckpointError, read_checkpoint, save_rule
from learned_optim.meta import provenance
from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Method, Report, TrainingError
from learned_optim.meta.recipes import AnyRecipe, Recipe
from learned_optim.meta.run_folder import RunFolder
from learned_optim.meta.tasks import TaskFamily
from learned_optim.meta.unrolls import Unrolls
from learned_optim.meta.whole_runs import WholeRuns
from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for

# Remedies for a diverging training.
ADVICE = "Lower --meta-lr, or clip with --clip-norm"


@dataclass(frozen=True)
class Metrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        round: epochs done; or meta-steps, of evolution strategies.
        meta_steps: meta-steps done.
        meta_loss: mean over the round's runs of the loss summed over the horizon; or of the
            fitness, of evolution strategies.
        meta_lr: meta-learning rate of the last meta-step.
        dropped: unrolls or tasks left out because something in them was not finite.
        seconds: duration of the round without validation.
        runs_per_second: optimizee runs trained per second.
        validation: of the averaged weights, the lower the better; ``None`` in rounds without one.
        ratio_to_adamw: validation relative to tuned AdamW on the same runs; ``None`` if unknown.
        validation_seconds: duration of the validation.
        seconds_left: of the remaining rounds, if they take as long as those before.
        details: of the method.
    """

    round: int
    meta_steps: int
    meta_loss: float
    meta_lr: float
    dropped: int
    seconds: float
    runs_per_second: float
    validation: float | None = None
    ratio_to_adamw: float | None = None
    validation_seconds: float = 0.0
    seconds_left: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


class MetaTrainer:
    """Trains by a recipe in a run folder; a second trainer resumes.

    The folder holds ``recipe.json``, ``protocol.json`` (versions, and the source of a task or rule
    of one's own), ``metrics.jsonl`` (one line per round), ``references.json`` (tuned AdamW on the
    validation runs), ``best.safetensors`` (best by validation) and ``resume.pt``. A kill loses at
    most the current round, and a resumed run gives the same bits as an uninterrupted one.

    Under ``torchrun``, ranks share the tasks of every meta-step and average their meta-gradients.
    Recipes of evolution strategies share the tasks of a meta-step among ``workers`` instead.

    Args:
        recipe: what to train.
        folder: the run folder, created if needed.
        data: where image sets are looked for.
        workers: processes of a training by evolution strategies.
        family: the tasks, if ``recipe.task`` is no registered name: see
            :func:`~learned_optim.meta.meta_train`.
        test_family: tasks for the test figures in the checkpoint; if not given, those of
            ``recipe.test_task`` or, without it, ``family``.
        against_adamw: tune AdamW on the validation runs before training, and report validation as
            a ratio to it. Evolution strategies always do.

    Raises:
        ValueError: the rule or the task cannot be meta-trained (:func:`check_family`); the folder
            belongs to a run of another recipe, torch, release or source of tasks, or is damaged; or
            the checkpoint to start from belongs to another rule or to one of another size.

    Attributes:
        rule: the rule in training.
        ema_rule: the moving average of its weights, which is validated and saved.
        history: the metrics of each round.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        folder: str | Path,
        data: DataOptions | None = None,
        *,
        workers: int = 1,
        family: TaskFamily | None = None,
        test_family: TaskFamily | None = None,
        against_adamw: bool = True,
    ) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.data, self.files = data or DataOptions(), RunFolder(self.folder)
        self.method = self._method(workers, family, test_family, against_adamw)
        if self.method.family is not None:
            check_family(self.method.family, recipe.task)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.rule = rule_for(recipe.rule)
        self.method.check_rule(self.rule)
        self.rule.warmup_steps, self.rule.trained_steps = 0, self.method.longest_run
        self._start: str | None = None  # fingerprint of the weights before training, if learned
        if recipe.start:
            start = load_rule(recipe.start)
            self.rule.init_from(start)
            self._start = start.fingerprint()
        self.optimizer = MetaOptimizer(
            self.rule, meta_lr=recipe.meta_lr, meta_lr_final=recipe.meta_lr_final,
            average=self.method.average, betas=self.method.betas, clip_norm=self.method.clip_norm,
        )  # fmt: skip
        self.history: list[Metrics] = []
        self.files.claim(recipe, self._conditions(), write=self.method.rank == 0)
        self.files.resume(self._load)

    def _method(
        self,
        workers: int,
        family: TaskFamily | None,
        test_family: TaskFamily | None,
        against_adamw: bool,
    ) -> Method:
        if isinstance(self.recipe, Recipe):
            if workers != 1:
                raise ValueError(
                    f"workers={workers} apply to recipes of evolution strategies: start others by "
                    f"torchrun"
                )
            return Unrolls(self.recipe, self.data, self.folder, family, test_family, against_adamw)
        if not against_adamw:
            raise ValueError(
                "against_adamw=False does not apply to recipes of evolution strategies, whose "
                "validation is relative to tuned AdamW"
            )
        return WholeRuns(self.recipe, self.data, self.folder, workers, family)

    @property
    def ema_rule(self) -> UpdateRule:
        return self.optimizer.ema_rule

    @property
    def round(self) -> int:
        """Rounds done: epochs; or meta-steps, of evolution strategies."""
        return len(self.history)

    @property
    def meta_steps(self) -> int:
        return self.optimizer.steps

    @property
    def best(self) -> Metrics | None:
        """The round with the smallest validation."""
        validated = [line for line in self.history if line.validation is not None]
        return min(validated, key=lambda line: line.validation or 0.0, default=None)

    @property
    def progress(self) -> tuple[int, int]:
        """Runs or meta-steps done, and in all."""
        method = self.method
        done = self.round * method.runs_per_round + method.runs_done
        return done, method.rounds * method.runs_per_round

    # ---- the run folder

    def _conditions(self) -> dict[str, str]:
        """What the run depends on besides the recipe."""
        conditions = provenance.conditions(self.method.registered, self.data)
        conditions |= provenance.conditions_of_classes(type(self.rule), type(self.recipe.rule))
        if self.method.given is not None:
            conditions |= provenance.conditions_of_given(self.recipe.task, self.method.given)
        if self._start is not None:
            conditions["weights of start"] = self._start
        return conditions

    def _load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history = [Metrics(**line) for line in saved["history"]]

    def _save(self) -> None:
        """Write the best checkpoint, then the state: a kill in between repeats the round."""
        if self.best is self.history[-1]:
            save_rule(self.ema_rule, self.files.best, self.record())
        history = [asdict(line) for line in self.history]
        self.files.write_state({"optimizer": self.optimizer.state_dict(), "history": history})

    def record(self) -> dict[str, Any]:
        """How the averaged weights were made, for the checkpoint's header."""
        last = self.history[-1] if self.history else None
        return {
            "recipe": self.recipe.to_json(),
            "commit": provenance.source_version(),
            **({"epoch": self.round} if self.method.unit == "epoch" else {}),
            "meta_steps": self.meta_steps,
            "ratio_to_adamw": last.ratio_to_adamw if last else None,
            "dropped": sum(line.dropped for line in self.history),
            **(last.details.get("validation", {}) if last else {}),
            **self.method.trained_on(),
            "torch": torch.__version__.split("+")[0],
            **({"start": self._start} if self._start else {}),
        }

    def finish(self, output: Path | None = None, report: Report | None = None) -> Path:
        """Test the finished weights on fresh runs, and write their checkpoint.

        Args:
            output: where to; into the run folder, and named after it, if not given.
            report: takes lines on the progress.

        Returns:
            The file written. Its record describes the weights in it: recipe, commit, validation
            and test figures. Test tasks come from the evaluation split and choose nothing.

        Raises:
            TrainingError: no validation is finite, so that no weights are worth keeping.
            CheckpointError: the best checkpoint of the folder is damaged.
        """
        if self.best is None or not math.isfinite(self.best.validation or 0.0):
            raise TrainingError(
                f"none of the {self.round} {self.method.unit}s in {self.folder} has a finite "
                f"validation: there are no weights worth keeping. {ADVICE}"
            )
        rule, record = self.ema_rule, self.record()
        if self.method.keeps_best:
            try:
                rule, record = read_checkpoint(self.files.best)
            except (CheckpointError, FileNotFoundError) as error:
                raise CheckpointError(
                    f"{error}. To train again from the beginning, delete the run folder "
                    f"{self.folder}"
                ) from error
        record |= {"recipe": self.recipe.to_json(), "rounds": self.round}
        record |= self.method.test(rule, self._teller(report))
        path = output or self.files.finished
        save_rule(rule, path, record)
        return path

    # ---- training

    def run(self, output: Path | None = None, progress: bool = False) -> Path:
        """:meth:`train`, and :meth:`finish` unless the checkpoint is there; returns its path.

        Args:
            output: where the checkpoint goes; into the run folder if not given.
            progress: show a progress bar on standard error.
        """
        path, first = output or self.files.finished, self.method.rank == 0
        if first and progress and self.method.note:
            print(self.method.note, file=sys.stderr)
        with ProgressBar("meta-training") if first and progress else nullcontext() as show:

            def report(text: str) -> None:
                if show is not None:
                    show(*self.progress, text)

            report("starting")
            self.train(report)
            if first and not self._is_finished(path):
                self.finish(path, report)
        self.method.barrier()  # no rank reads the file before it is there
        return path

    def _is_finished(self, path: Path) -> bool:
        """Whether the file is the finished checkpoint of this run."""
        try:
            _, record = read_checkpoint(path)
        except (FileNotFoundError, CheckpointError):
            return False
        done = {"recipe": self.recipe.to_json(), "rounds": self.round}
        return all(record.get(name) == value for name, value in done.items())

    def train(self, report: Report | None = None) -> None:
        """Run the remaining rounds; ``report`` takes a line after every run and meta-step.

        Raises:
            TrainingError: nothing in a round was finite.
            ValueError: another process trains in the folder.
            OSError: a file cannot be written; the folder holds the last round before.
        """
        if self.is_over():
            return
        tell, locked = self._teller(report), self.method.rank == 0
        with self.files.locked() if locked else nullcontext(), self.method.session(tell):
            self.files.resume(self._load)  # another process may have gone on meanwhile
            while not self.is_over():
                self._train_round(self.round + 1, tell)
                tell("")

    def _train_round(self, number: int, tell: Report) -> None:
        started = time.perf_counter()
        done = self.method.train_round(number, self.optimizer, tell)
        seconds = time.perf_counter() - started
        validation, details = None, done.details
        if self.method.validates_after(number):
            validation = self.method.validate(self.ema_rule, tell)
            details = {**details, "validation": validation.figures}
        if not math.isfinite(done.meta_loss) and not (
            validation and math.isfinite(validation.value)
        ):
            raise TrainingError(
                f"{self.method.unit} {number} taught nothing: {done.why}. {ADVICE}. {self.folder} "
                f"holds the {self.round} {self.method.unit}s before"
            )
        line = Metrics(
            number, self.meta_steps, done.meta_loss, self.optimizer.lr, done.dropped, seconds,
            done.runs / seconds,
            validation.value if validation else None,
            validation.ratio_to_adamw if validation else None,
            time.perf_counter() - started - seconds,
            details=details,
        )  # fmt: skip
        spent = sum(m.seconds + m.validation_seconds for m in [*self.history, line])
        left = spent / number * (self.method.rounds - number)
        self.history.append(replace(line, seconds_left=left))
        self.method.runs_done = 0
        if self.method.rank == 0:
            self._save()

    def is_over(self) -> bool:
        """Whether all rounds are done, or too many without a better validation."""
        best, patience = self.best, getattr(self.recipe, "patience", None)
        if best is not None and patience is not None and self.round - best.round >= patience:
            return True
        return self.round >= self.method.rounds

    def validate(self, rule: UpdateRule | None = None) -> float:
        """:meth:`Method.validate` of the averaged weights, or of another rule."""
        return self.method.validate(rule or self.ema_rule, lambda _: None).value

    # ---- progress

    def _teller(self, report: Report | None) -> Report:
        """``report``, with the best validation and the pace added to its lines."""

        def tell(what: str) -> None:
            if report is None:
                return
            parts, best = [what or f"{self.method.unit} {self.round}"], self.best
            if best is not None:
                parts.append(f"best {best.validation:.4g}")
                if best.ratio_to_adamw is not None:
                    parts.append(f"{best.ratio_to_adamw:.2f} of tuned AdamW's")
            if self.history:
                parts.append(f"{self.history[-1].runs_per_second:.3g} runs/s")
            report(", ".join(parts))

        return tell
