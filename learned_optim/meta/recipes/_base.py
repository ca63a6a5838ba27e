"""Recipes: everything that determines a meta-training run, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from learned_optim._fields import check_fields
from learned_optim.rules import RuleConfig, rule_reference

#: The entry ``method`` in the JSON form of an :class:`EvolutionRecipe`.
METHOD = "evolution"

#: Mixtures of :mod:`learned_optim.meta.populations`: a recipe's task may be one of them.
MIXTURE_NAMES = ("populations-2", "populations-3")


class _Checked:
    """Checks of a recipe's values by type and bounds, and its JSON form."""

    rule: RuleConfig
    _at_least: ClassVar[Mapping[str, int]]
    _positive: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for name, least in self._at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in self._positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        data = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {**data, "rule": {"name": rule_reference(self.rule), "config": data["rule"]}}


@dataclasses.dataclass(frozen=True)
class Recipe(_Checked):
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
    """Checkpoint whose weights training begins with, of a rule of the same kind and size; untrained
    weights if not given."""
    runs_per_epoch: int = 100
    """Optimizee runs per epoch (thesis section 4.1), one after another."""
    tasks_per_meta_step: int = 1
    """Optimizees side by side in every run; their meta-gradients are averaged."""
    horizon: int = 100
    """Inner steps of one optimizee run."""
    truncation: int = 20
    """Inner steps per unroll, and so per meta-step."""
    long_horizon: int | None = None
    """Inner steps of the longest runs."""
    long_fraction: float = 0.0
    """Share of runs whose length is log-uniform between ``horizon`` and ``long_horizon``."""
    long_truncation: int | None = None
    """Inner steps per unroll of the longer runs; ``truncation`` if not given."""
    unrolls_per_run: int | None = None
    """Longer runs learn from this many of their unrolls, drawn at random; from all if not given."""
    estimator: Literal["replay", "autograd", "full", "pes"] = "replay"
    """Meta-gradients by backpropagation, or by persistent evolution strategies."""
    coordinates: int | None = None
    """Coordinates sampled per replay; all of them if not given."""
    sampling: Literal["uniform", "stratified"] = "uniform"
    """How coordinates are drawn: from all tensors together, or the same number from each."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights, of `pes`."""
    sigma: float = 0.01
    """Standard deviation of the perturbations."""
    meta_lr_final: float | None = None
    """Meta-learning rate after the last meta-step, by a cosine; constant if not given."""
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
    test_task: str | None = None
    """Task family of the test runs, if another than ``task``."""
    seed: int = 0
    """Seed of everything random in the run."""

    _at_least: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("epochs", "runs_per_epoch", "tasks_per_meta_step", "horizon"), 1),
        **dict.fromkeys(("truncation", "long_truncation", "unrolls_per_run"), 1),
        **dict.fromkeys(("coordinates", "pairs", "validation_horizon", "patience"), 1),
        "validation_runs": 2,
        "test_runs": 2,  # their standard deviation goes into the checkpoint's record
        "meta_lr_final": 0,
    }
    _positive: ClassVar[tuple[str, ...]] = ("meta_lr", "clip_norm", "sigma")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.long_fraction <= 1:
            raise ValueError(f"long_fraction must lie in [0, 1], got {self.long_fraction}")
        if self.long_fraction and (self.long_horizon or 0) < self.horizon:
            raise ValueError(
                f"long_fraction={self.long_fraction} needs a long_horizon of at least "
                f"horizon={self.horizon}, got {self.long_horizon}"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average must lie in [0, 1), got {self.average}")
        if self.estimator == "pes" and self.unrolls_per_run is not None:
            raise ValueError(
                f"estimator='pes' learns from every unroll of a run, because its particles go "
                f"through all of them: leave out unrolls_per_run={self.unrolls_per_run}"
            )

    @property
    def longest_run(self) -> int:
        """Inner steps of the longest runs."""
        return max(self.horizon, self.long_horizon or 0) if self.long_fraction else self.horizon


@dataclasses.dataclass(frozen=True)
class EvolutionRecipe(_Checked):
    """What to meta-train by antithetic evolution strategies, and how.

    See :mod:`learned_optim.meta.whole_runs`.
    """

    rule: RuleConfig
    """Configuration of the update rule; its type says which rule."""
    meta_steps: int
    """Meta-steps, over which the meta-learning rate falls by a cosine."""
    meta_lr: float
    """Learning rate of the meta-optimizer, Adam, at the first meta-step."""
    meta_lr_final: float
    """The same after the last meta-step."""
    tasks_per_meta_step: int = 8
    """Tasks of every meta-step; their meta-gradients are averaged."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights per task, a run each."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    large_from: int = 1_000_000
    """Meta-steps before large tasks, whose widths and batches are from the upper part of their
    ranges: small networks teach the most per second, and users' are larger."""
    large_share: float = 1.0
    """Share of large tasks from then on."""
    start: str = ""
    """Checkpoint whose weights training begins with, of a rule of the same kind and size; untrained
    weights if not given."""
    validation_tasks: int = 64
    """Tasks, always the same, on which weights are compared with tuned AdamW."""
    validation_every: int = 50
    """Meta-steps from one validation to the next."""
    seed: int = 0
    """Seed of everything random in the training."""
    task: str = "populations-2"
    """Mixture of tasks, `populations-2` or `populations-3`, or a family that may meta-train."""
    horizon: int | None = None
    """Inner steps of the runs of a task family. Mixtures draw their own."""

    _at_least: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("meta_steps", "tasks_per_meta_step", "pairs", "horizon"), 1),
        **dict.fromkeys(("validation_tasks", "validation_every"), 1),
        "meta_lr_final": 0,
        "seed": 0,
    }
    _positive: ClassVar[tuple[str, ...]] = ("meta_lr", "sigma")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.horizon is None) != (self.task in MIXTURE_NAMES):
            raise ValueError(
                f"task {self.task!r} needs a horizon, the inner steps of its runs: the mixtures "
                f"{' and '.join(MIXTURE_NAMES)} alone draw them"
                if self.horizon is None
                else f"horizon={self.horizon} does not apply to the mixture {self.task!r}, which "
                f"draws the lengths of runs for each task"
            )
        if not 0 <= self.large_share <= 1:
            raise ValueError(f"large_share must be in [0, 1], got {self.large_share}")

    def to_json(self) -> dict[str, Any]:
        return {"method": METHOD, **super().to_json()}


#: A recipe of either method: meta-gradients by backpropagation, or evolution strategies.
AnyRecipe: TypeAlias = Recipe | EvolutionRecipe
