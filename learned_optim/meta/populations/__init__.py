"""Tasks written for many copies of a network at once, for evolution strategies on whole runs."""

from learned_optim.meta.populations._base import (
    Batch,
    Params,
    Population,
    Sampler,
    UnusableTaskError,
)
from learned_optim.meta.populations._driver import CopiesOptimizer
from learned_optim.meta.populations._mixture import (
    FAMILIES,
    MIXTURES,
    TRAINED_FOR,
    Draw,
    draw,
    sample,
)
from learned_optim.meta.populations._rollout import (
    ADAMW_LRS,
    fitness,
    roll,
    roll_adamw,
    roll_held_out,
    scores,
)

__all__ = [
    "ADAMW_LRS",
    "FAMILIES",
    "MIXTURES",
    "TRAINED_FOR",
    "Batch",
    "CopiesOptimizer",
    "Draw",
    "Params",
    "Population",
    "Sampler",
    "UnusableTaskError",
    "draw",
    "fitness",
    "roll",
    "roll_adamw",
    "roll_held_out",
    "sample",
    "scores",
]
