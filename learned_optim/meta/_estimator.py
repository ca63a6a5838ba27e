"""What every estimator of meta-gradients takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Generator, Tensor

from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import UpdateRule

Sampling = Literal["uniform", "stratified"]


@dataclass(frozen=True)
class EstimatorOptions:
    """What some estimators can be told.

    Attributes:
        coordinates: replay this many randomly sampled coordinates (unbiased); ``None``: all.
        generator: draws them, or the perturbations of ``es`` and ``pes``.
        sampling: ``"uniform"`` over all coordinates, or ``"stratified"``: as many of every tensor,
            and all of those that have fewer. A small tensor, an output layer say, can carry most
            of the meta-gradient, and a uniform sample of a large network hardly meets it.
        pairs: pairs of opposite perturbations, of ``es`` and ``pes``.
        sigma: standard deviation of the perturbations of each weight.
        rank: which share of the pairs to run.
        world: how many ranks share them. More than 1 need a process group.
    """

    coordinates: int | None = None
    generator: Generator | None = None
    sampling: Sampling = "uniform"
    pairs: int = 4
    sigma: float = 0.01
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class MetaGradient:
    """The outcome of one unroll.

    Attributes:
        losses: under the rule's own weights, shape ``(steps, B)``, detached.
        grads: d meta-loss / d weight, one per ``rule.parameters()``.
    """

    losses: Tensor
    grads: list[Tensor]


Estimator: TypeAlias = Callable[[UpdateRule, Optimizees, int, EstimatorOptions], MetaGradient]
