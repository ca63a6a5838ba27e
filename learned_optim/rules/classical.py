"""SGD, momentum, RMSprop and Adam written as update rules: the reference of the optimizer's tests.

Inside :class:`~learned_optim.LearnedOptimizer` they follow ``torch.optim`` to float tolerance. So
other behaviour of a learned rule comes from the rule, not from the optimizer around it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learned_optim.rules._base import RuleConfig, State, StepContext, UpdateRule
from learned_optim.rules._features import bias_correction, zeros_by_column
from learned_optim.rules._segments import Segments


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
    test_configs = (SGDConfig(momentum=0.9, nesterov=True), SGDConfig())
    zero_preserving = True
    config: SGDConfig

    def init_state(self, param: Tensor) -> State:
        return {"momentum": zeros_by_column(param, 1, self.dtype)} if self.config.momentum else {}

    def moments(self, grad: Tensor, state: State) -> State:
        if not self.config.momentum:
            return {}
        return {"momentum": self.config.momentum * state["momentum"] + grad.unsqueeze(-1)}

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        beta, direction = self.config.momentum, grad.unsqueeze(-1)
        if beta:
            momentum = state["momentum"]
            direction = direction + beta * momentum if self.config.nesterov else momentum
        return None, -self.config.lr * direction


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
    test_configs = (RMSpropConfig(),)
    zero_preserving = True
    config: RMSpropConfig

    def init_state(self, param: Tensor) -> State:
        return {"second_moment": zeros_by_column(param, 1, self.dtype)}

    def moments(self, grad: Tensor, state: State) -> State:
        alpha, square = self.config.alpha, grad.square().unsqueeze(-1)
        return {"second_moment": alpha * state["second_moment"] + (1 - alpha) * square}

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        root = state["second_moment"].sqrt() + self.config.eps
        return None, -self.config.lr * grad.unsqueeze(-1) / root


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
    test_configs = (AdamConfig(),)
    zero_preserving = True
    config: AdamConfig

    def init_state(self, param: Tensor) -> State:
        return {
            "first_moment": zeros_by_column(param, 1, self.dtype),
            "second_moment": zeros_by_column(param, 1, self.dtype),
        }

    def moments(self, grad: Tensor, state: State) -> State:
        cfg, grad = self.config, grad.unsqueeze(-1)
        return {
            "first_moment": cfg.beta1 * state["first_moment"] + (1 - cfg.beta1) * grad,
            "second_moment": cfg.beta2 * state["second_moment"] + (1 - cfg.beta2) * grad.square(),
        }

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[None, Tensor]:
        """The two bias corrections."""
        return None, bias_correction(context.step + 1, self.config.beta1, self.config.beta2)

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        assert stats is not None
        first = state["first_moment"] / stats[0].unsqueeze(-1)
        second = state["second_moment"] / stats[1].unsqueeze(-1)
        return None, -self.config.lr * first / (second.sqrt() + self.config.eps)
