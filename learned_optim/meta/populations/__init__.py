"""Tasks for many copies of a network at once, for evolution on whole runs."""

from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._mixture import MIXTURES, TRAINED_FOR, Draw, draw
from learned_optim.meta.populations._rollout import (
    ADAMW_LRS,
    fitness,
    roll,
    roll_adamw,
    scores,
)

__all__ = [
    "ADAMW_LRS",
    "MIXTURES",
    "TRAINED_FOR",
    "Batch",
    "Draw",
    "Params",
    "Population",
    "draw",
    "fitness",
    "roll",
    "roll_adamw",
    "scores",
]
