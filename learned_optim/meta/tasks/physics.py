"""A physics-informed network (Raissi et al. 2019): a nonlinear heat equation in one dimension.

    u_t = 0.1 u_xx - u^3 + f(t, x),   t in [0, 1], x in [-1, 1],

with ``f`` such that u(t, x) = exp(-t) sin(pi x) + exp(-2 t) sin(3 pi x) / 2 solves it. The loss is
the mean squared residual at 128 random points plus ten times the mean squared error at 64 random
points of the initial and boundary values. The held-out figure is the relative error of u on a
grid.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.tasks._base import Batch, EvaluationTask, ModuleTask, Params

INTERIOR, BOUNDARY = 128, 64
DIFFUSION, BOUNDARY_WEIGHT = 0.1, 10.0


def waves(points: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of ``u`` at ``points`` ``(n, 2)`` of t and x: shapes ``(n,)``."""
    t, x = points.unbind(1)
    slow = (-t).exp() * (math.pi * x).sin()
    return slow, 0.5 * (-2 * t).exp() * (3 * math.pi * x).sin()


def solution(points: Tensor) -> Tensor:
    """``u`` at ``points`` ``(n, 2)``: shape ``(n,)``."""
    slow, fast = waves(points)
    return slow + fast


def source(points: Tensor) -> Tensor:
    """``f`` at ``points`` ``(n, 2)``: shape ``(n,)``."""
    slow, fast = waves(points)
    u_xx = -(math.pi**2) * slow - 9 * math.pi**2 * fast
    return -slow - 2 * fast - DIFFUSION * u_xx + (slow + fast) ** 3


class HeatEquation(ModuleTask):
    """A perceptron of two tanh layers of 32 units for u(t, x)."""

    def __init__(self) -> None:
        super().__init__(_network, _points)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        inside, border = batch
        inside = inside.detach().requires_grad_()
        u = torch.func.functional_call(self.module, params, (inside,))[:, 0]
        (slopes,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (curvatures,) = torch.autograd.grad(slopes[:, 1].sum(), inside, create_graph=True)
        residual = slopes[:, 0] - DIFFUSION * curvatures[:, 1] + u**3 - source(inside.detach())
        at_border = torch.func.functional_call(self.module, params, (border,))[:, 0]
        misfit = at_border - solution(border)
        return residual.square().mean() + BOUNDARY_WEIGHT * misfit.square().mean()

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        axes = torch.linspace(0.0, 1.0, 41), torch.linspace(-1.0, 1.0, 81)
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        u, found = solution(points), torch.func.functional_call(self.module, params, (points,))
        mse = (found[:, 0] - u).square().mean()
        return {"loss": mse.item(), "relative error": (mse / u.square().mean()).sqrt().item()}


def _network() -> nn.Module:
    hidden = (nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(32, 1))


def _points(generator: Generator) -> Batch:
    """Random points inside; and half of the others at t = 0, half at x = -1 or 1."""
    unit = torch.rand(INTERIOR + BOUNDARY, 2, generator=generator)
    points = torch.stack((unit[:, 0], 2.0 * unit[:, 1] - 1.0), 1)
    inside, border = points[:INTERIOR], points[INTERIOR:]
    border[: BOUNDARY // 2, 0] = 0.0
    border[BOUNDARY // 2 :, 1] = border[BOUNDARY // 2 :, 1].sign()
    return inside, border


FAMILIES = {"physics-informed": EvaluationTask(lambda _: HeatEquation(), steps=4000, quick=800)}
