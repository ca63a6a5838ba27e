"""Recipes of meta-trainings by evolution strategies on whole runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from learned_optim._fields import check_fields
from learned_optim.rules import RuleConfig, rule_reference

#: What the entry ``method`` of a recipe's JSON form says.
METHOD = "evolution"

#: Mixtures of :mod:`learned_optim.meta.populations`: a recipe's task may be one of them.
MIXTURE_NAMES = ("populations-2", "populations-3")

#: Their seeds are kept free of training tasks.
MOST_VALIDATION_TASKS = 100_000

_AT_LEAST = {
    "meta_steps": 1,
    "tasks_per_meta_step": 1,
    "pairs": 1,
    "meta_lr_final": 0,
    "validation_tasks": 1,
    "validation_every": 1,
    "horizon": 1,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class EvolutionRecipe:
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
    """The same by the last meta-step."""
    tasks_per_meta_step: int = 8
    """Tasks of every meta-step; their meta-gradients are averaged."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights per task, a run each."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    large_from: int = 1_000_000
    """Meta-steps with tasks of all sizes; later ones draw widths and batches from the upper part of
    their ranges: small networks teach the most per second, and users' are larger."""
    large_share: float = 1.0
    """Share of their tasks that are larger ones."""
    start: str = ""
    """Checkpoint from whose weights the training starts (random ones if not given): a shipped name,
    a file or a Hub id, of a rule of the same kind and size."""
    validation_tasks: int = 64
    """Tasks, always the same, on which weights are held against tuned AdamW."""
    validation_every: int = 50
    """Meta-steps from one validation to the next."""
    seed: int = 0
    """Seed of everything random in the training."""
    task: str = "populations-2"
    """Mixture of tasks, `populations-2` or `populations-3`, or a family that may meta-train."""
    horizon: int | None = None
    """Inner steps of the runs of a task family. Mixtures draw their own."""
    shortest_horizon: int | None = None
    """If given, the lengths of these runs are log-uniform between it and ``horizon``."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.validation_tasks > MOST_VALIDATION_TASKS:
            raise ValueError(
                f"validation_tasks must be at most {MOST_VALIDATION_TASKS}, got "
                f"{self.validation_tasks}"
            )
        if (self.horizon is None) != (self.task in MIXTURE_NAMES):
            raise ValueError(
                f"task {self.task!r} needs a horizon, the inner steps of its runs: the mixtures "
                f"{' and '.join(MIXTURE_NAMES)} alone draw them"
                if self.horizon is None
                else f"horizon={self.horizon} does not apply to the mixture {self.task!r}, which "
                f"draws the lengths of runs for each task"
            )
        if self.shortest_horizon is not None and (
            self.horizon is None or not 1 <= self.shortest_horizon <= self.horizon
        ):
            raise ValueError(
                f"shortest_horizon must lie between 1 and horizon={self.horizon}, got "
                f"{self.shortest_horizon}"
            )
        if not 0 <= self.large_share <= 1:
            raise ValueError(f"large_share must be in [0, 1], got {self.large_share}")
        for name in ("meta_lr", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        data = dataclasses.asdict(self)
        data["rule"] = {"name": rule_reference(self.rule), "config": data["rule"]}
        return {"method": METHOD, **data}
