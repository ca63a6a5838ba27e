"""Quadratics and Rosenbrock's valley."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.sampler import Sampler


class Quadratic(Population):
    """``|W (x + noise) - y|^2`` with a random or ill-conditioned ``W``, or Rosenbrock's function.

    ``random`` is that of Andrychowicz et al. (2016): ten dimensions, normal entries, start at zero.
    """

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        generator = draw.generator
        self.size = draw.log_integer(4, 100)
        self.kind = draw.choice(["random", "ill-conditioned", "rosenbrock"], [2, 3, 1])
        if self.kind == "random":
            self.size = 10
            self.matrix = torch.randn(10, 10, generator=generator)
            self.target = torch.randn(10, generator=generator)
            self.start = torch.zeros(10)
        elif self.kind == "ill-conditioned":
            normal = torch.randn(self.size, self.size, generator=generator)
            rotation, _ = torch.linalg.qr(normal)
            roots = torch.exp(torch.linspace(0, -draw.uniform(1, 5), self.size))
            self.matrix = (rotation if draw.chance(0.6) else torch.eye(self.size)) * roots
            self.target = torch.zeros(self.size)
        if self.kind != "random":
            normal = torch.randn(self.size, generator=generator)
            self.start = normal * draw.log_uniform(0.1, 3)
        self.noise = draw.choice([0, 0.1, 0.5], [2, 1, 1])

    def init(self, generator: Generator) -> Params:
        return {"x": self.start.clone()}

    def batch(self, generator: Generator) -> Batch:
        return (self.noise * torch.randn(self.size, generator=generator),)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x, (noise,) = params["x"], batch  # (B, size), (size,)
        if self.kind == "rosenbrock":
            x = x + 0.05 * noise
            valley = (x[:, 1:] - x[:, :-1] ** 2) ** 2
            return (valley * 5 + (1 - x[:, :-1]) ** 2).mean(1)
        return ((x + noise) @ self.matrix.T - self.target).square().sum(1)
