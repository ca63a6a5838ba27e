"""The meta-optimizer: Adam on the weights of a rule, and their moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learned_optim.meta.recipes import Recipe
from learned_optim.rules import UpdateRule


class MetaOptimizer:
    """Clips a meta-gradient, takes Adam's step, and averages the weights.

    Args:
        recipe: meta-learning rate and its schedule, largest norm, decay of the average.
        rule: whose weights are trained.
        kept: holds their moving average, which is validated and saved.

    Attributes:
        adam: the optimizer of the weights.
        steps: meta-steps taken.
    """

    def __init__(self, recipe: Recipe, rule: UpdateRule, kept: UpdateRule) -> None:
        self.recipe, self.rule, self.kept = recipe, rule, kept
        self.adam = torch.optim.Adam(rule.parameters(), lr=recipe.meta_lr)
        self.steps = 0

    def step(self, flat_grad: Tensor, progress: float) -> None:
        """One meta-step.

        Args:
            flat_grad: the meta-gradient, in the order of ``rule.parameters()``; shape ``(n,)``.
            progress: share of the whole training done before.
        """
        recipe = self.recipe
        if recipe.clip_norm is not None:
            flat_grad = flat_grad * (recipe.clip_norm / (flat_grad.norm() + 1e-12)).clamp(max=1.0)
        weights = list(self.rule.parameters())
        parts = flat_grad.split([w.numel() for w in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight).clone()
        for group in self.adam.param_groups:
            group["lr"] = self.lr(progress)
        self.adam.step()
        self.steps += 1
        with torch.no_grad():
            for kept, weight in zip(self.kept.parameters(), weights, strict=True):
                kept.lerp_(weight, 1.0 - recipe.average)

    def lr(self, progress: float) -> float:
        """Cosine from ``meta_lr`` to ``meta_lr_final`` over the whole training, or constant."""
        recipe = self.recipe
        if recipe.meta_lr_final is None:
            return recipe.meta_lr
        swing = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return recipe.meta_lr_final + (recipe.meta_lr - recipe.meta_lr_final) * swing
