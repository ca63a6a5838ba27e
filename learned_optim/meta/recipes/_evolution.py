"""Recipes of meta-trainings by evolution strategies on whole runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from learned_optim._fields import check_fields
from learned_optim.meta.schedules import SCHEDULE, Schedule
from learned_optim.rules import RuleConfig

#: What the entry ``method`` of a recipe's JSON form says.
METHOD = "evolution"

#: Mixtures of :mod:`learned_optim.meta.populations`: a recipe's task may be one of them.
MIXTURE_NAMES = ("populations", "populations-2", "populations-3")

_AT_LEAST = {
    "meta_steps": 0,
    "tasks_per_meta_step": 1,
    "pairs": 1,
    "meta_lr_final": 0,
    "validation_tasks": 1,
    "validation_every": 1,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class EvolutionRecipe:
    """What to meta-train by antithetic evolution strategies, and how.

    See :class:`~learned_optim.meta.evolution.EvolutionTrainer`.
    """

    rule: RuleConfig
    """Configuration of the update rule; its type says which rule."""
    meta_steps: int
    """Meta-steps, over which the meta-learning rate falls by a cosine. With none, the weights of
    ``start`` are validated under this configuration of the rule, and are what is kept."""
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
    a file or a Hub id, of the same rule. Inputs that it lacks begin with weights of zero."""
    start_share: float = 0.0
    """Share of the weights before training in the finished ones, which are a mean of both."""
    validation_tasks: int = 64
    """Tasks, always the same, on which weights are held against tuned AdamW."""
    validation_every: int = 50
    """Meta-steps from one validation to the next."""
    seed: int = 0
    """Seed of everything random in the training."""
    task: str = "populations"
    """Mixture of tasks, `populations` or `populations-2`, or a task family that may meta-train."""
    horizon: Schedule | None = dataclasses.field(default=None, metadata=SCHEDULE)
    """Inner steps of the runs of a task family: a number, log-uniform:LOW:HIGH, or
    growing:FIRST:LAST:META_STEPS. Mixtures draw their own."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.meta_steps and not self.start:
            raise ValueError("meta_steps is 0 and there is no start: nothing would be learned")
        if (self.horizon is None) != (self.task in MIXTURE_NAMES):
            raise ValueError(
                f"task {self.task!r} needs a horizon, the inner steps of its runs: the mixtures "
                f"{' and '.join(MIXTURE_NAMES)} alone draw them"
                if self.horizon is None
                else f"horizon={self.horizon} does not apply to the mixture {self.task!r}, which "
                f"draws the lengths of runs for each task"
            )
        if isinstance(self.horizon, int) and self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must be in [0, 1), got {self.start_share}")
        if not 0 <= self.large_share <= 1:
            raise ValueError(f"large_share must be in [0, 1], got {self.large_share}")
        for name in ("meta_lr", "sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        from learned_optim.meta.recipes._base import rule_reference

        data = dataclasses.asdict(self)
        data["rule"] = {"name": rule_reference(self.rule), "config": data["rule"]}
        return {"method": METHOD, **data}


#: Fields of a recipe by what they are about, for help.
EVOLUTION_GROUPS = {
    "how long": ("meta_steps",),
    "what is trained": ("task", "start"),
    "optimizee runs": ("horizon",),
    "meta-gradients": ("tasks_per_meta_step", "pairs", "sigma", "large_from", "large_share"),
    "what is kept": ("start_share",),
    "meta-optimizer": ("meta_lr", "meta_lr_final"),
    "validation": ("validation_tasks", "validation_every"),
    "randomness": ("seed",),
}

#: Those that most people change.
EVOLUTION_COMMON = ("meta_steps", "tasks_per_meta_step", "pairs", "meta_lr", "seed")
