"""What every estimator of meta-gradients takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Generator, Tensor

from learned_optim.meta.meta_loss import Imitation, LossWeights
from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import UpdateRule

Sampling = Literal["uniform", "stratified"]
Fitness = Literal["sum", "log-final"]
Compression = Literal["none", "asinh", "sign"]


@dataclass(frozen=True)
class EstimatorOptions:
    """What some estimators can be told.

    Attributes:
        coordinates: replay this many randomly sampled coordinates (unbiased); ``None``: all.
        generator: draws them, or the perturbations of ``es`` and ``pes``.
        sampling: ``"uniform"`` over all coordinates, or ``"stratified"``: as many of every tensor,
            and all of those that have fewer. A small tensor, an output layer say, can carry most
            of the meta-gradient, and a uniform sample of a large network hardly meets it.
        fitness: what an unroll is judged by, of each optimizee: ``"sum"`` of its losses, or
            ``"log-final"``, the logarithm of its last loss. See :data:`FITNESS`.
        pairs: pairs of opposite perturbations, of ``es`` and ``pes``.
        sigma: standard deviation of the perturbations of each weight.
        compression: what happens to the difference of fitness within a pair, of each optimizee:
            see :data:`learned_optim.meta.antithetic.COMPRESSIONS`.
        compression_unit: differences well below it pass ``"asinh"`` unchanged.
        weights: of the losses in the meta-loss; ``None``: their plain sum. Not of ``es`` and
            ``pes``, which need the meta-loss's value and not only its slopes.
        imitation: an auxiliary meta-loss; ``None``: none. Not of ``es`` and ``pes``.
        rank: which share of the pairs to run.
        world: how many ranks share them. More than 1 need a process group.
    """

    coordinates: int | None = None
    generator: Generator | None = None
    sampling: Sampling = "uniform"
    fitness: Fitness = "sum"
    pairs: int = 4
    sigma: float = 0.01
    compression: Compression = "none"
    compression_unit: float = 0.02
    weights: LossWeights | None = None
    imitation: Imitation | None = None
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

#: The fitness ``(B,)`` of an unroll from its losses ``(steps, B)``; differentiable.
FITNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda losses: losses.sum(0),
    "log-final": lambda losses: losses[-1].log(),
}
