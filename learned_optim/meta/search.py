"""The thesis's choice of a meta-learning rate: random search, log-uniform in [1e-5, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from learned_optim.meta.data import DataOptions
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.seeding import seeded
from learned_optim.meta.trainer import MetaTrainer, TrainingError


@dataclass(frozen=True)
class SearchConfig:
    """Try random meta-learning rates on short runs of a recipe; resumable like any run."""

    recipe: Recipe
    folder: Path = Path("runs")
    """Each trial is a run folder in here."""
    trials: int = 8
    """Meta-learning rates to try."""
    trial_epochs: int = 2
    """Epochs of each trial."""
    low: float = 1e-5
    """Smallest meta-learning rate."""
    high: float = 1.0
    """Largest meta-learning rate."""
    threads: int = 1
    """Threads of torch, for the command; see ``train``."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where data is looked for."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.trial_epochs < 1:
            raise ValueError(
                f"trials and trial_epochs must be at least 1, "
                f"got {self.trials} and {self.trial_epochs}"
            )
        if not 0.0 < self.low < self.high:
            raise ValueError(f"need 0 < low < high, got low={self.low} and high={self.high}")


@dataclass(frozen=True)
class Trial:
    """One meta-learning rate and its best validation; inf if the run diverged."""

    meta_lr: float
    validation: float


def search(
    config: SearchConfig,
    on_trial: Callable[[Trial], None] | None = None,
    on_run: Callable[[int], None] | None = None,
) -> list[Trial]:
    """Train each trial and return them, best first.

    The schedule keeps its shape: its final rate is scaled along with its first.

    Args:
        config: what to search.
        on_trial: told every finished trial.
        on_run: told how many optimizee runs of the present trial are done.

    Raises:
        TrainingError: every trial diverged.
    """

    def count(epoch: int, run: int, meta_loss: float) -> None:
        if on_run is not None:
            on_run((epoch - 1) * config.recipe.runs_per_epoch + run + 1)

    recipe = config.recipe
    draws = torch.rand(config.trials, generator=seeded(recipe.seed, "search"))
    trials = []
    for index, u in enumerate(draws.tolist()):
        # Two digits are plenty, and give the same folder on every platform.
        meta_lr = float(f"{config.low * (config.high / config.low) ** u:.2g}")
        final = recipe.meta_lr_final
        short = replace(
            recipe,
            meta_lr=meta_lr,
            meta_lr_final=None if final is None else meta_lr * final / recipe.meta_lr,
            epochs=config.trial_epochs,
        )
        trainer = MetaTrainer(short, config.folder / f"trial-{index}-{meta_lr:g}", config.data)
        with suppress(TrainingError):  # that a rate is too high is a result
            trainer.train(count)
        trial = Trial(meta_lr, trainer.best.validation if trainer.best else math.inf)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    if all(math.isinf(trial.validation) for trial in trials):
        rates = ", ".join(f"{trial.meta_lr:g}" for trial in trials)
        raise TrainingError(
            f"every trial diverged (meta-learning rates {rates}): lower --low and --high, or try "
            f"more --trials"
        )
    return sorted(trials, key=lambda trial: trial.validation)
