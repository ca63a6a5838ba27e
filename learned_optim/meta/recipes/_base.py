"""Recipes: everything that determines a meta-training run, as data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim._fields import check_fields
from learned_optim.rules import RuleConfig, build_rule, rule_for

_AT_LEAST = {
    "epochs": 1,
    "runs_per_epoch": 1,
    "tasks_per_meta_step": 1,
    "horizon": 1,
    "truncation": 1,
    "long_truncation": 1,
    "unrolls_per_run": 1,
    "coordinates": 1,
    "validation_runs": 2,
    "validation_horizon": 1,
    "test_runs": 2,  # their standard deviation goes into the checkpoint's record
    "patience": 1,
    "meta_lr_final": 0,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to meta-train, on what, and how."""

    task: str
    """Registered task family; its meta-training split is used."""
    rule: RuleConfig
    """Configuration of the update rule; its type says which rule."""
    epochs: int
    """How many epochs to run."""
    meta_lr: float
    """Learning rate of the meta-optimizer, Adam."""
    start: str | None = None
    """Checkpoint whose weights training begins with, which may have fewer units; weights that it
    lacks, and all if not given, begin untrained."""
    start_share: float = 0.0
    """Share of these weights in the finished ones, which then forget less of what `start` can do
    and training did not show (Wortsman et al. 2022)."""
    runs_per_epoch: int = 100
    """Optimizee runs per epoch (thesis section 4.1), one after another."""
    tasks_per_meta_step: int = 1
    """Optimizees side by side in every run; their meta-gradients are averaged."""
    horizon: int = 100
    """Inner steps of one optimizee run."""
    truncation: int = 20
    """Inner steps per unroll, and so per meta-step."""
    long_horizon: int | None = None
    """Where the heavy tail of run lengths ends; all runs are of ``horizon`` if not given."""
    long_fraction: float = 0.0
    """Share of runs whose length is log-uniform between ``horizon`` and ``long_horizon``."""
    long_truncation: int | None = None
    """Inner steps per unroll of the longer runs; ``truncation`` if not given."""
    unrolls_per_run: int | None = None
    """Longer runs learn from this many of their unrolls, drawn at random; from all if not given."""
    estimator: Literal["replay", "autograd", "full"] = "replay"
    """How meta-gradients are computed."""
    coordinates: int | None = None
    """Coordinates sampled per replay; all of them if not given."""
    sampling: Literal["uniform", "stratified"] = "uniform"
    """How they are drawn: from all alike, or as many from every tensor."""
    meta_lr_final: float | None = None
    """Where a cosine takes the meta-learning rate by the last meta-step; constant if not given."""
    clip_norm: float | None = None
    """Largest norm of a meta-gradient; longer ones are scaled down."""
    relative_loss: bool = False
    """Divide every meta-gradient by its unroll's mean loss: tasks of all scales count alike."""
    average: float = 0.0
    """Decay of the moving average of weights that is validated and kept; 0 keeps the last."""
    validation_runs: int = 20
    """Fresh optimizee runs, the same after every epoch, that choose the best epoch."""
    validation_horizon: int | None = None
    """Inner steps of validation and test runs; ``horizon`` if not given."""
    validation_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """Mean over runs of the summed loss; the geometric one suits tasks of different scales."""
    test_runs: int = 100
    """Fresh optimizee runs of the evaluation split for the figures in the checkpoint."""
    patience: int | None = None
    """Stop after this many epochs without a better validation."""
    seed: int = 0
    """Seed of everything random in the run."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.long_fraction <= 1:
            raise ValueError(f"long_fraction must lie in [0, 1], got {self.long_fraction}")
        if self.long_fraction and (self.long_horizon or 0) < self.horizon:
            raise ValueError(
                f"long_fraction={self.long_fraction} needs a long_horizon of at least "
                f"horizon={self.horizon}, got {self.long_horizon}"
            )
        for name in ("meta_lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must lie in [0, 1), got {self.start_share}")
        if self.start_share and self.start is None:
            raise ValueError(f"start_share={self.start_share} needs a start to share in")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must lie in [0, 1), got {self.average}")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        data = dataclasses.asdict(self)
        data["rule"] = {"name": rule_for(self.rule).name, "config": data["rule"]}
        return data


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_json`.

    Raises:
        ValueError: unknown or missing fields, or values that do not fit them.
    """
    try:
        rule = data["rule"]
        config = build_rule(rule["name"], rule["config"]).config
        return Recipe(**{**data, "rule": config})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a recipe: {error}") from error


def recipes() -> dict[str, Recipe]:
    """The recipes that ship with the package, by name: each module's ``RECIPE``."""
    modules = import_submodules("learned_optim.meta.recipes")
    return {
        module.__name__.rsplit(".", 1)[1].replace("_", "-"): module.RECIPE for module in modules
    }


def load_recipe(source: str) -> Recipe:
    """A recipe by shipped name or from a JSON file.

    Raises:
        ValueError: neither a shipped name nor a readable recipe file.
        FileNotFoundError: a path to a JSON file that does not exist.
    """
    known = recipes()
    if source in known:
        return known[source]
    path = Path(source)
    if path.suffix == ".json" and not path.is_file():
        raise FileNotFoundError(f"no recipe file at {path}")
    if path.suffix != ".json":
        raise unknown_name("recipe", source, list(known))
    try:
        return recipe_from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
