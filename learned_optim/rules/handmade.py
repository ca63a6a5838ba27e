"""SGD, momentum, RMSprop and Adam written as update rules: the oracles of the wrapper's tests.

Inside :class:`~learned_optim.LearnedOptimizer` they follow ``torch.optim`` to float tolerance, so
whatever differs in a learned rule's behaviour is the rule, not the plumbing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.rules._base import RuleConfig, State, UpdateRule


def _zeros(param: Tensor) -> Tensor:
    """A per-coordinate buffer of shape ``(*param.shape, 1)``, as the state layout asks."""
    return torch.zeros_like(
        param, dtype=torch.float32, memory_format=torch.contiguous_format
    ).unsqueeze(-1)


@dataclass(frozen=True)
class SGDConfig(RuleConfig):
    """Hyperparameters of :class:`SGDRule`, named and defaulted as in ``torch.optim.SGD``."""

    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False


class SGDRule(UpdateRule):
    """Stochastic gradient descent, with heavy-ball or Nesterov momentum (Sutskever et al. 2013)."""

    name = "sgd"
    Config = SGDConfig
    zero_preserving = True
    config: SGDConfig

    def init_state(self, param: Tensor) -> State:
        return {"momentum": _zeros(param)} if self.config.momentum else {}

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        beta = self.config.momentum
        if not beta:
            return -self.config.lr * grad, {}
        momentum = beta * state["momentum"].squeeze(-1) + grad
        direction = grad + beta * momentum if self.config.nesterov else momentum
        return -self.config.lr * direction, {"momentum": momentum.unsqueeze(-1)}


@dataclass(frozen=True)
class RMSpropConfig(RuleConfig):
    """Hyperparameters of :class:`RMSpropRule`, named and defaulted as in ``torch.optim``."""

    lr: float = 0.01
    alpha: float = 0.99
    eps: float = 1e-8


class RMSpropRule(UpdateRule):
    """RMSprop (Tieleman and Hinton 2012)."""

    name = "rmsprop"
    Config = RMSpropConfig
    zero_preserving = True
    config: RMSpropConfig

    def init_state(self, param: Tensor) -> State:
        return {"second_moment": _zeros(param)}

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        alpha = self.config.alpha
        second = alpha * state["second_moment"].squeeze(-1) + (1 - alpha) * grad.square()
        update = -self.config.lr * grad / (second.sqrt() + self.config.eps)
        return update, {"second_moment": second.unsqueeze(-1)}


@dataclass(frozen=True)
class AdamConfig(RuleConfig):
    """Hyperparameters of :class:`AdamRule`, named and defaulted as in ``torch.optim.Adam``."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class AdamRule(UpdateRule):
    """Adam (Kingma and Ba 2015, algorithm 1)."""

    name = "adam"
    Config = AdamConfig
    zero_preserving = True
    config: AdamConfig

    def init_state(self, param: Tensor) -> State:
        return {
            "first_moment": _zeros(param),
            "second_moment": _zeros(param),
            "count": torch.zeros((), device=param.device),
        }

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        cfg = self.config
        count = state["count"] + 1
        first = cfg.beta1 * state["first_moment"].squeeze(-1) + (1 - cfg.beta1) * grad
        second = cfg.beta2 * state["second_moment"].squeeze(-1) + (1 - cfg.beta2) * grad.square()
        # 1 - beta^t without cancellation, which float32 would feel while beta^t is near 1.
        first_hat = first / -torch.expm1(count * math.log(cfg.beta1))
        second_hat = second / -torch.expm1(count * math.log(cfg.beta2))
        update = -cfg.lr * first_hat / (second_hat.sqrt() + cfg.eps)
        new_state = {
            "first_moment": first.unsqueeze(-1),
            "second_moment": second.unsqueeze(-1),
            "count": count,
        }
        return update, new_state
