"""Progress of :func:`~learned_optim.meta.meta_train`: lines on standard error."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from learned_optim.meta.evolution import EvolutionTrainer
from learned_optim.meta.progress import pace_text, time_text
from learned_optim.meta.trainer import MetaTrainer

# Seconds of silence after which whatever is done next is said.
_SILENCE = 30.0


class _Lines:
    """Says how far validation is, and AdamW, where that takes long."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def report(self, what: str, done: int, total: int) -> None:
        """For the trainers' ``train``, and ``finish``."""
        if self._is_overdue():
            self._say(f"{what} {done}/{total}")

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._said > _SILENCE

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"meta_train: {text}", file=sys.stderr, flush=True)


class EpochLines(_Lines):
    """A line per epoch of a training by unrolls."""

    def __init__(self, trainer: MetaTrainer) -> None:
        super().__init__()
        self.trainer, self.shown = trainer, trainer.epoch
        done, epochs = trainer.epoch, trainer.recipe.epochs
        steps = trainer.recipe.validation_horizon or trainer.recipe.horizon
        self._say(f"{'resuming' if done else 'starting'} in {trainer.folder}: {epochs} epochs")
        alone = None if trainer.family.stackable else trainer.family.alone_because
        if alone and trainer.recipe.tasks_per_meta_step > trainer.ranks.task_world:
            self._say(f"forward passes one optimizee after another: {alone}")
        if not done:
            self._say(
                f"untrained: validation {trainer.validator.mean(trainer.kept, alone=True):.4g}, "
                f"loss over {steps} steps"
            )

    def on_run(self, epoch: int, run: int, meta_loss: float) -> None:
        """Say what is new; for :meth:`MetaTrainer.train`."""
        self._say_new()

    def end(self, path: Path, record: dict[str, Any]) -> None:
        """Say what came of the training."""
        self._say_new()
        test = record["test"]
        tested = f"test {test['mean']:.4g} ± {test['std']:.4g} on {test['runs']} fresh runs"
        against = pace_text(None, record["ratio_to_adamw"])
        figures = ", ".join([f"validation {record['validation']:.4g}", *[against] * bool(against)])
        self._say(f"best epoch {record['epoch']}: {figures}, {tested}")
        self._say(f"wrote {path}")

    def _say_new(self) -> None:
        history, epochs = self.trainer.history, self.trainer.recipe.epochs
        for line in history[self.shown :]:
            dropped = f", {line.dropped} unrolls dropped" if line.dropped else ""
            pace = pace_text(line.runs_per_second, line.ratio_to_adamw)
            left = f", {time_text(line.seconds_left)} left" if line.seconds_left else ""
            self._say(
                f"epoch {line.epoch}/{epochs}: meta-loss {line.meta_loss:.4g}, validation "
                f"{line.validation:.4g} (best {line.best:.4g}), {pace}{dropped}{left}"
            )
        self.shown = len(history)


class MetaStepLines(_Lines):
    """Lines of a training by evolution strategies: at validations, and else every half minute."""

    def __init__(self, trainer: EvolutionTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        done, meta_steps = trainer.meta_steps, trainer.recipe.meta_steps
        self._say(
            f"{'resuming' if done else 'starting'} in {trainer.folder}: {meta_steps} meta-steps"
        )

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Say how far it is; for :meth:`EvolutionTrainer.train`."""
        if "validation" not in metrics and not self._is_overdue():
            return
        values = [task["fitness"] for task in metrics["tasks"]]
        fitness = f"fitness {sum(values) / len(values):.3f}, " if values else ""
        skipped = f", {len(metrics['skipped'])} tasks skipped" if metrics["skipped"] else ""
        pace = pace_text(metrics["runs_per_second"], metrics.get("ratio_to_adamw"))
        left = metrics["seconds_left"]
        self._say(
            f"meta-step {metrics['meta_step']}/{self.trainer.recipe.meta_steps}: "
            f"{fitness}{pace}{skipped}"
            f"{f', {time_text(left)} left' if left else ''}"
        )

    def end(self, path: Path, record: dict[str, Any]) -> None:
        """Say what came of the training."""
        average = record["behind_adamw"]["average"]
        self._say(
            f"{pace_text(None, record['ratio_to_adamw'])} final loss on validation runs, ahead on "
            f"{average['share_ahead']:.0%} of {self.trainer.recipe.validation_tasks}"
        )
        self._say(f"wrote {path}")
