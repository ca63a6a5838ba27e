"""What an unroll is judged by: weights of its losses, and likeness to a hand-written optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from learned_optim.rules import Segments, State, StepContext
from learned_optim.rules.classical import AdamConfig, AdamRule

if TYPE_CHECKING:
    from learned_optim.meta.recipes import Recipe

# Loss below which nothing is divided any further: such a task is solved.
SMALLEST_LOSS = 1e-3

Transform = Literal["identity", "log"]


@dataclass(frozen=True)
class LossWeights:
    """The meta-loss of a run of T steps, sum_t w_t f(L_t), in an unroll that begins at ``first``.

    The weights are w_t proportional to (t / T)^power from step ``start * T`` on, 0 before it, and 1
    in the mean over the run, so that meta-losses of all choices are of one size. With power 0 and
    start 0, that is the plain sum.

    Attributes:
        transform: f: ``"identity"``, or ``"log"``, to which tasks of all scales count alike. Its
            slope is that at a loss of :data:`SMALLEST_LOSS` from there on.
        start: share of the run before the meta-loss begins.
        power: how much late steps count for.
        first: step of the run at which the unroll begins.
        length: T.
    """

    transform: Transform = "identity"
    start: float = 0.0
    power: float = 0.0
    first: int = 0
    length: int = 1

    def __call__(self, losses: Tensor) -> Tensor:
        """Weights of an unroll's losses, both ``(steps, B)``.

        The gradient of sum(weights * losses), with the weights held constant, is the meta-loss's.
        """
        place = torch.arange(1, self.length + 1, dtype=losses.dtype) / self.length
        weights = place**self.power * (place > self.start)
        weights = weights / weights.mean()
        weights = weights[self.first : self.first + len(losses), None].expand_as(losses)
        if self.transform == "log":
            weights = weights / losses.clamp_min(SMALLEST_LOSS)
        return weights


@dataclass
class Imitation:
    """An auxiliary meta-loss: the squared distance of updates from Adam's (Chen et al. 2020).

    Adam sees the gradients of the optimizee that the learned rule trains. The distance is in units
    of Adam's learning rate and a mean over coordinates, summed over the steps of an unroll.

    Attributes:
        weight: of the distance beside the loss.
        lr: Adam's learning rate.
        state: Adam's, from one unroll of a run to the next.
        steps: how many gradients Adam has seen: those of unrolls that end in a meta-step.
    """

    weight: float
    lr: float
    state: State = field(default_factory=dict)
    steps: int = 0

    def target(self, grad: Tensor, packed: Tensor, segments: Segments) -> Tensor:
        """Adam's update at the next gradient; tensors are ``(n,)``."""
        rule = AdamRule(AdamConfig(lr=self.lr)).to(packed.dtype)
        if not self.state:
            self.state = {
                key: value.new_zeros(len(packed), value.shape[-1])
                for key, value in rule.init_state(packed).items()
            }
        context = StepContext(torch.full((len(segments),), float(self.steps), dtype=packed.dtype))
        with torch.no_grad():
            update, new = rule(grad.detach(), self.state, packed.detach(), segments, context)
        self.state, self.steps = {**self.state, **new}, self.steps + 1
        return update

    def distance(self, update: Tensor, target: Tensor) -> Tensor:
        """The weighted distance of an update, ``(n,)``; shape ``()``."""
        return self.weight * ((update - target) / self.lr).square().mean()

    def slope(self, update: Tensor, target: Tensor) -> Tensor:
        """The gradient of :meth:`distance` in the update, ``(n,)``."""
        return 2.0 * self.weight * (update - target) / (self.lr**2 * len(update))


def loss_weights(recipe: Recipe, first: int, length: int) -> LossWeights | None:
    """Those that a recipe asks for; ``None`` for the plain sum.

    Args:
        recipe: has the three fields that say so.
        first: step of the run at which the unroll begins.
        length: steps of the run.
    """
    weights = LossWeights(recipe.loss_transform, recipe.loss_from, recipe.loss_power, first, length)
    plain = LossWeights(first=first, length=length)
    return None if weights == plain else weights


def imitation(recipe: Recipe, epoch: int) -> Imitation | None:
    """What a run of an epoch, counted from 1, imitates by its recipe."""
    over = recipe.imitation_epochs is not None and epoch > recipe.imitation_epochs
    if not recipe.imitation or over:
        return None
    return Imitation(recipe.imitation, recipe.imitation_lr)
