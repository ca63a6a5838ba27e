"""A physics-informed network (Raissi et al. 2019): a nonlinear heat equation in one dimension.

    u_t = 0.1 u_xx - u^3 + f(t, x),   t in [0, 1], x in [-1, 1],

with ``f`` such that u(t, x) = exp(-t) sin(pi x) + exp(-2 t) sin(3 pi x) / 2 solves it. The loss is
the mean squared residual at 128 random places plus ten times the mean squared error at 64 random
places of the initial and boundary values. The held-out figure is the relative error of u on a
grid.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import (
    Batch,
    Horizon,
    ModuleTask,
    Params,
    evaluation_family,
)

INTERIOR, BOUNDARY = 128, 64
DIFFUSION, BOUNDARY_WEIGHT = 0.1, 10.0


def solution(places: Tensor) -> Tensor:
    """``u`` at ``places`` ``(n, 2)`` of t and x: shape ``(n,)``."""
    t, x = places.unbind(1)
    return (-t).exp() * (math.pi * x).sin() + 0.5 * (-2 * t).exp() * (3 * math.pi * x).sin()


def source(places: Tensor) -> Tensor:
    """``f`` at ``places`` ``(n, 2)``: shape ``(n,)``."""
    t, x = places.unbind(1)
    slow = (-t).exp() * (math.pi * x).sin()
    fast = 0.5 * (-2 * t).exp() * (3 * math.pi * x).sin()
    u_xx = -(math.pi**2) * slow - 9 * math.pi**2 * fast
    return -slow - 2 * fast - DIFFUSION * u_xx + (slow + fast) ** 3


class HeatEquation(ModuleTask):
    """A perceptron of two tanh layers of 32 units for u(t, x)."""

    def __init__(self) -> None:
        super().__init__(_network, _places)

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
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        u, found = solution(places), torch.func.functional_call(self.module, params, (places,))
        mse = (found[:, 0] - u).square().mean()
        return {"loss": mse.item(), "relative error": (mse / u.square().mean()).sqrt().item()}


def _network() -> nn.Module:
    hidden = (nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(32, 1))


def _places(generator: Generator) -> Batch:
    """Random places inside; and half of the others at t = 0, half at x = -1 or 1."""
    unit = torch.rand(INTERIOR + BOUNDARY, 2, generator=generator)
    places = torch.stack((unit[:, 0], 2.0 * unit[:, 1] - 1.0), 1)
    inside, border = places[:INTERIOR], places[INTERIOR:]
    border[: BOUNDARY // 2, 0] = 0.0
    border[BOUNDARY // 2 :, 1] = border[BOUNDARY // 2 :, 1].sign()
    return inside, border


def _heat_equation(data: DataOptions) -> ModuleTask:
    return HeatEquation()


FAMILIES = {"physics-informed": evaluation_family("physics-informed", _heat_equation)}
FIELD = {"physics-informed": Horizon(4000, 800)}
