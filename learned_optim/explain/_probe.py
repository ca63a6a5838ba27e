"""One tensor under an update rule, with synthetic gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim._tensors import init_scale
from learned_optim.rules import UpdateRule, classical

#: Steps of a history, and steps at its end over which the size of a step is averaged.
SETTLED, AVERAGED = 100, 20
#: Shape of the probed tensor unless the shape varies.
SHAPE = (32, 32)

#: Hand-written rules beside the learned one. Their learning rates are matched to its steps.
REFERENCES: dict[str, Callable[[], UpdateRule]] = {
    "Adam": lambda: classical.AdamRule(classical.AdamConfig(lr=1.0)),
    "RMSprop": lambda: classical.RMSpropRule(classical.RMSpropConfig(lr=1.0)),
    "momentum": lambda: classical.SGDRule(classical.SGDConfig(lr=1.0, momentum=0.9)),
}


class Probe:
    """A tensor that is put back after every step, so that only the rule's state changes.

    Args:
        rule: the update rule; a rule that reads the loss is shown a loss of 1.
        shape: shape of the tensor.
        scale: root mean square of its entries; ``None`` for the usual one of the shape.
        total_steps: length of the run, for rules that read it.
    """

    def __init__(
        self,
        rule: UpdateRule,
        shape: tuple[int, ...] = SHAPE,
        scale: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.scale = init_scale(shape) if scale is None else scale
        draws = torch.randn(math.prod(shape), generator=Generator().manual_seed(0))
        self.param = self.scale * draws / draws.square().mean().sqrt()
        self._tensor = nn.Parameter(self.param.view(shape).clone())
        self._optimizer = LearnedOptimizer(
            [self._tensor], rule, total_steps=total_steps if rule.reads_horizon else None,
            warmup=0, weight_decay=0.0,
        )  # fmt: skip

    @torch.no_grad()
    def advance(self, grad: Tensor) -> Tensor:
        """The update ``(n,)`` of one step with a gradient ``(n,)``."""
        self._tensor.grad = grad.view_as(self._tensor).clone()
        self._optimizer.step(lambda: 1.0)
        update = self._tensor.flatten() - self.param
        self._tensor.copy_(self.param.view_as(self._tensor))
        return update

    def alternatives(self, grads: list[Tensor]) -> list[Tensor]:
        """The updates that each of several gradients would give next."""
        state = copy.deepcopy(self._optimizer.state_dict())
        updates = []
        for grad in grads:
            updates.append(self.advance(grad))
            self._optimizer.load_state_dict(copy.deepcopy(state))
        return updates


def rms(value: Tensor) -> float:
    """Root mean square."""
    return float(value.square().mean().sqrt())


def typical(n: int, signal: float = 0.3) -> Callable[[], Tensor]:
    """Gradients ``(n,)`` of mean square 1 with a constant part of amplitude ``signal``."""
    generator = Generator().manual_seed(1)
    fixed = torch.randn(n, generator=generator).sign() * signal
    noise = math.sqrt(max(0.0, 1.0 - signal**2))
    return lambda: fixed + noise * torch.randn(n, generator=generator)


def settled_step(probe: Probe, grads: Callable[[], Tensor]) -> float:
    """Root mean square of the last steps of a history, in units of the tensor's scale."""
    sizes = [rms(probe.advance(grads())) for _ in range(SETTLED)]
    return sum(sizes[-AVERAGED:]) / AVERAGED / probe.scale
