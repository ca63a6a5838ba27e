"""A problem whose meta-gradients are known exactly: a noisy quadratic and a rule of two weights.

The loss ``sum_i h_i theta_i^2 / 2 + z theta``, with fresh noise z at every step, is the model by
which Wu et al. 2018 (arXiv 1803.02021) explain the bias of short horizons. Under a rule that is
linear in gradients, the second moments of the run follow a linear recursion. So the expected
meta-loss and its derivatives are sums that float64 computes to the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import RuleConfig, Segments, State, StepContext, UpdateRule

#: Decay of the rule's momentum.
BETA = 0.9


class TwoRates(UpdateRule):
    """``update = -(w_0 grad + w_1 momentum)``; ``momentum`` averages gradients with decay 0.9."""

    rows = "tensors"

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__(RuleConfig())
        self.rates = nn.Parameter(torch.tensor(rates, dtype=torch.float64))

    def init_state(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param).unsqueeze(-1)}

    def moments(self, grad: Tensor, state: State) -> State:
        return {"momentum": state["momentum"].lerp(grad.unsqueeze(-1), 1 - BETA)}

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, None]:
        return means.new_zeros(len(segments), 1), None

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        return None, -torch.cat([grad.unsqueeze(-1), state["momentum"]], 1)

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        return self.rates.expand(*features.shape[:2], 2), {}


@dataclass(frozen=True)
class NoisyQuadratic(Task):
    """Independent copies of the problem as the coordinates of one optimizee.

    Args:
        copies: how many; the loss is the sum over them.
        curvatures: h, of the coordinates of one copy.
        noise: standard deviation of z.
    """

    copies: int = 100
    curvatures: tuple[float, ...] = (1.0, 0.3, 0.05)
    noise: float = 0.5

    def init(self, generator: Generator) -> Params:
        return {"theta": self._normal(generator)}

    def batch(self, generator: Generator) -> Batch:
        return (self.noise * self._normal(generator),)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        theta = params["theta"]
        return (0.5 * theta.new_tensor(self.curvatures) * theta.square() + batch[0] * theta).sum()

    def _normal(self, generator: Generator) -> Tensor:
        shape = (self.copies, len(self.curvatures))
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class ExactGradients:
    """Expected meta-gradients of one copy, summed over the unrolls of a run, each ``(2,)``.

    Attributes:
        first_order: truncated, d grad / d weight = 0: what ``autograd`` and ``replay`` estimate.
        truncated: exact within each unroll: ``full``, and ``es`` for small perturbations.
        whole: of the whole run: ``full`` without truncation, ``pes``.
    """

    first_order: Tensor
    truncated: Tensor
    whole: Tensor


def exact_gradients(
    task: NoisyQuadratic, rates: Sequence[float], unrolls: int, steps: int
) -> ExactGradients:
    """The targets of all estimators for runs of ``unrolls`` times ``steps`` inner steps."""
    truncated, first_order = _gradient(task, rates, unrolls, steps, truncated=True)
    whole, _ = _gradient(task, rates, unrolls, steps, truncated=False)
    return ExactGradients(first_order, truncated, whole)


def _gradient(
    task: NoisyQuadratic, rates: Sequence[float], unrolls: int, steps: int, truncated: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the expected meta-loss, and the first-order one, each ``(2,)``."""
    weights = torch.tensor(rates, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(task.curvatures, dtype=torch.float64)  # (d,)
    # Second moments of the parameter, the momentum, and the sums of gradients and of momenta over
    # the unroll; gradients go through them.
    moments = torch.zeros(len(h), 4, 4, dtype=torch.float64)
    moments[:, 0, 0] = 1.0
    transition, kick = _linear_step(h, *weights)
    noise = task.noise**2 * kick[..., :, None] * kick[..., None, :]
    total, first_order = weights.new_zeros(()), weights.new_zeros(2)
    for _ in range(unrolls):
        moments = (moments.detach() if truncated else moments).clone()
        moments[:, 2:], moments[:, :, 2:] = 0.0, 0.0  # sums begin anew
        for _ in range(steps):
            total = total + (0.5 * h * moments[:, 0, 0]).sum()
            first_order = first_order - (h[:, None] * moments[:, 0, 2:]).sum(0)
            moments = transition @ moments @ transition.mT + noise
    (gradient,) = torch.autograd.grad(total, weights)
    return gradient, first_order.detach()


def _linear_step(h: Tensor, rate: Tensor, momentum_rate: Tensor) -> tuple[Tensor, Tensor]:
    """One inner step as ``x -> transition x + kick z``, ``(d, 4, 4)`` and ``(d, 4)``.

    x: parameter, momentum, sum of gradients, sum of momenta.
    """
    h, rate, momentum_rate = torch.broadcast_tensors(h, rate, momentum_rate)
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    momentum = torch.stack([(1 - BETA) * h, BETA * one, zero, zero], -1)
    gradient = torch.stack([h, zero, zero, zero], -1)
    unit = torch.eye(4, dtype=h.dtype).expand(*h.shape, 4, 4)
    parameter = unit[..., 0, :] - rate[..., None] * gradient - momentum_rate[..., None] * momentum
    rows = [parameter, momentum, unit[..., 2, :] + gradient, unit[..., 3, :] + momentum]
    kick = torch.stack(
        [-rate - (1 - BETA) * momentum_rate, (1 - BETA) * one, one, (1 - BETA) * one], -1
    )
    return torch.stack(rows, -2), kick
