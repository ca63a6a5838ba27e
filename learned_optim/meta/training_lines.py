"""Progress of :func:`~learned_optim.meta.meta_train`: lines on standard error."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from learned_optim.meta.evolution import EvolutionTrainer
from learned_optim.meta.progress import pace_text, time_text
from learned_optim.meta.trainer import MetaTrainer

# Seconds that pass at most between two lines of a training by evolution strategies, if it goes on.
_SILENCE = 30.0


class EpochLines:
    """A line per epoch of a training by unrolls."""

    def __init__(self, trainer: MetaTrainer) -> None:
        self.trainer, self.shown = trainer, trainer.epoch
        done, epochs = trainer.epoch, trainer.recipe.epochs
        steps = trainer.recipe.validation_horizon or trainer.recipe.horizon
        say(f"{'resuming' if done else 'starting'} in {trainer.folder}: {epochs} epochs")
        alone = None if trainer.family.stackable else trainer.family.alone_because
        if alone and trainer.recipe.tasks_per_meta_step > trainer.ranks.task_world:
            say(f"forward passes one optimizee after another: {alone}")
        if not done:
            say(
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
        say(f"best epoch {record['epoch']}: {figures}, {tested}")
        say(f"wrote {path}")

    def _say_new(self) -> None:
        history, epochs = self.trainer.history, self.trainer.recipe.epochs
        for line in history[self.shown :]:
            dropped = f", {line.dropped} unrolls dropped" if line.dropped else ""
            pace = pace_text(line.runs_per_second, line.ratio_to_adamw)
            left = f", {time_text(line.seconds_left)} left" if line.seconds_left else ""
            say(
                f"epoch {line.epoch}/{epochs}: meta-loss {line.meta_loss:.4g}, validation "
                f"{line.validation:.4g} (best {line.best:.4g}), {pace}{dropped}{left}"
            )
        self.shown = len(history)


class MetaStepLines:
    """Lines of a training by evolution strategies: at validations, and else every half minute."""

    def __init__(self, trainer: EvolutionTrainer) -> None:
        self.trainer, self.said = trainer, time.monotonic()
        done, meta_steps = trainer.meta_steps, trainer.recipe.meta_steps
        say(f"{'resuming' if done else 'starting'} in {trainer.folder}: {meta_steps} meta-steps")

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Say how far it is; for :meth:`EvolutionTrainer.train`."""
        if "validation" not in metrics and time.monotonic() - self.said < _SILENCE:
            return
        self.said = time.monotonic()
        fitness = [task["fitness"] for task in metrics["tasks"]]
        skipped = f", {len(metrics['skipped'])} tasks skipped" if metrics["skipped"] else ""
        pace = pace_text(metrics["runs_per_second"], metrics.get("ratio_to_adamw"))
        left = metrics["seconds_left"]
        say(
            f"meta-step {metrics['meta_step']}/{self.trainer.recipe.meta_steps}: fitness "
            f"{sum(fitness) / len(fitness):.3f}, {pace}{skipped}"
            f"{f', {time_text(left)} left' if left else ''}"
        )

    def report(self, what: str, done: int, total: int) -> None:
        """Say how far validation is; for :meth:`EvolutionTrainer.train`."""
        if time.monotonic() - self.said > _SILENCE:
            self.said = time.monotonic()
            say(f"{what} {done}/{total}")

    def end(self, path: Path, record: dict[str, Any]) -> None:
        """Say what came of the training."""
        average = record["behind_adamw"]["average"]
        say(
            f"{pace_text(None, record['ratio_to_adamw'])} final loss on validation runs, ahead on "
            f"{average['share_ahead']:.0%} of {self.trainer.recipe.validation_tasks}"
        )
        say(f"wrote {path}")


def say(text: str) -> None:
    """A line on standard error."""
    print(f"meta_train: {text}", file=sys.stderr, flush=True)
