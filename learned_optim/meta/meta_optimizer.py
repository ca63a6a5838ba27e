"""The meta-optimizer: Adam, and a moving average of the weights."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel

from learned_optim.rules import UpdateRule


class MetaOptimizer:
    """Clips a meta-gradient, takes Adam's step, and averages the weights.

    Args:
        rule: the rule to train.
        meta_lr: Adam's learning rate.
        meta_lr_final: learning rate after the last meta-step, by a cosine; constant if ``None``.
        average: decay of the moving average. The first ``1 / (1 - average)`` weights, those before
            training included, have equal shares.
        betas: Adam's decays.
        clip_norm: largest norm of a meta-gradient; longer ones are scaled down.

    Attributes:
        steps: meta-steps taken.
        lr: learning rate of the last one.
    """

    def __init__(
        self,
        rule: UpdateRule,
        *,
        meta_lr: float,
        meta_lr_final: float | None,
        average: float,
        betas: tuple[float, float],
        clip_norm: float | None,
    ) -> None:
        self.rule, self._clip_norm = rule, clip_norm
        self._initial, self._final = meta_lr, meta_lr if meta_lr_final is None else meta_lr_final
        self._adam = torch.optim.Adam(rule.parameters(), lr=meta_lr, betas=betas)

        def averaged(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
            return mean.lerp(new, max(1 - average, 1 / (int(count) + 1)))

        self._averaged = AveragedModel(rule, avg_fn=averaged)
        self._averaged.n_averaged += 1  # the first weights are one of them
        self.steps = 0

    @property
    def lr(self) -> float:
        rate: float = self._adam.param_groups[0]["lr"]
        return rate

    @property
    def ema_rule(self) -> UpdateRule:
        """The rule with the average of the weights."""
        return cast(UpdateRule, self._averaged.module)

    @property
    def weights(self) -> Tensor:
        """The weights in training as one vector, ``(n,)``."""
        return parameters_to_vector(self.rule.parameters()).detach()

    def step(self, gradient: Tensor, progress: float) -> None:
        """One meta-step.

        Args:
            gradient: of the meta-loss, in the order of ``rule.parameters()``; shape ``(n,)``.
            progress: share of the whole training done before.
        """
        if self._clip_norm is not None:
            gradient = gradient * (self._clip_norm / (gradient.norm() + 1e-12)).clamp(max=1.0)
        weights = list(self.rule.parameters())
        parts = gradient.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight).clone()
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        self._adam.param_groups[0]["lr"] = self._final + (self._initial - self._final) * cosine
        self._adam.step()
        self._averaged.update_parameters(self.rule)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule.state_dict(),
            "averaged": self._averaged.state_dict(),
            "adam": self._adam.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self._averaged.load_state_dict(state["averaged"])
        self._adam.load_state_dict(state["adam"])
        self.steps = int(state["steps"])
