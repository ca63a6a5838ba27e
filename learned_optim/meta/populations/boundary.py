"""Boundary value problems solved by a network, as physics-informed networks do."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._layers import linear
from learned_optim.meta.populations._perceptron import Perceptron
from learned_optim.meta.sampler import Sampler


class BoundaryValue(Population):
    """``u'' / 10 + k u = sin(f pi x)`` on [0, 1] with ``u(0) = 0`` and ``u(1) = 1/2``.

    A tanh network is ``u``; the loss is the squared residual at random points and the weighted
    squared error at both ends (Raissi et al. 2019). Derivatives with respect to ``x`` are carried
    forward through the layers by hand, so one backward pass suffices.
    """

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        width = draw.log_integer(12, 48)
        self.depth = draw.choice([1, 2], [1, 2])
        self.batch_size = draw.log_integer(32, 256)
        self.stiffness = draw.uniform(-3, 3)
        self.frequency = draw.uniform(1, 6)
        self.boundary_weight = draw.log_uniform(1, 30)
        self.input_scale = draw.uniform(1, 4)
        init = draw.choice(["torch", "xavier"])
        self.net = Perceptron(1, 1, [width] * self.depth, "tanh", init)

    def batch(self, generator: Generator) -> Batch:
        return (torch.rand(self.batch_size, 1, generator=generator),)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        (x,) = batch  # (N, 1)
        value, _, second = self._with_derivatives(params, x)
        force = torch.sin(self.frequency * math.pi * x)
        residual = (second / 10 + self.stiffness * value - force) ** 2
        ends, _, _ = self._with_derivatives(params, torch.tensor([[0.0], [1.0]]))
        boundary = (ends - torch.tensor([[0.0], [0.5]])).square()
        return residual.mean((1, 2)) + self.boundary_weight * boundary.mean((1, 2))

    def _with_derivatives(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``u``, ``u'`` and ``u''`` at ``x``, each ``(B, N, 1)``."""
        weight = params["weight0"]
        copies = weight.shape[0]
        value = linear(x * self.input_scale, weight, params["bias0"])
        first = (self.input_scale * weight.transpose(1, 2)).expand(copies, x.shape[0], -1)
        second = torch.zeros_like(first)
        for layer in range(1, self.depth + 1):
            tanh = torch.tanh(value)
            slope = 1 - tanh * tanh
            second = slope * second - 2 * tanh * slope * first * first
            first = slope * first
            weight = params[f"weight{layer}"]
            value = linear(tanh, weight, params[f"bias{layer}"])
            first, second = linear(first, weight), linear(second, weight)
        return value, first, second
