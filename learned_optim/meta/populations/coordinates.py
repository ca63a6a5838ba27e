"""Coordinate networks: a signal as a function of position, by sines or by Fourier features."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._perceptron import Perceptron
from learned_optim.meta.sampler import Sampler

FOURIER_FEATURES = 12


class Coordinates(Population):
    """Fits a sum of random waves on ``[-1, 1]^d``, d = 1 or 2.

    The network has sine activations and the initialization of Sitzmann et al. (2020), or ReLU on
    random Fourier features (Tancik et al. 2020).
    """

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        generator = draw.generator
        self.dimensions = draw.choice([1, 2], [2, 1])
        self.sine = draw.chance(0.6)
        self.omega = 0.0
        if self.sine:  # 30 is what everybody uses
            self.omega = 30.0 if draw.chance(0.5) else draw.log_uniform(5, 60)
        width = draw.width(20, 160)
        depth = draw.choice([1, 2, 3], [1, 4, 1])
        waves = draw.integer(2, 5)
        highest = draw.log_uniform(6, 80 if self.dimensions == 1 else 30)
        shape = (waves, self.dimensions)
        self.frequencies = torch.randn(shape, generator=generator) * highest / 2
        self.amplitudes = torch.rand(waves, generator=generator) + 0.2
        self.phases = torch.rand(waves, generator=generator) * 6.3
        self.batch_size = draw.log_integer(64, 512)
        hidden = [width] * depth
        if self.sine:
            sine = lambda x: torch.sin(self.omega * x)  # noqa: E731
            self.net = Perceptron(self.dimensions, 1, hidden, sine, "torch")
        else:
            projection = torch.randn(self.dimensions, FOURIER_FEATURES, generator=generator)
            self.projection = projection * highest / 3
            self.net = Perceptron(2 * FOURIER_FEATURES, 1, hidden, "relu", "torch")

    def init(self, generator: Generator) -> Params:
        if not self.sine:
            return super().init(generator)
        params: Params = {}
        for layer, (fan_in, size) in enumerate(pairwise(self.net.sizes)):
            bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / self.omega
            weight = torch.rand(size, fan_in, generator=generator) * 2 - 1
            params[f"weight{layer}"] = weight * bound
            bias = torch.rand(size, generator=generator) * 2 - 1
            params[f"bias{layer}"] = bias / math.sqrt(fan_in)
        return params

    def batch(self, generator: Generator) -> Batch:
        places = torch.rand(self.batch_size, self.dimensions, generator=generator) * 2 - 1
        waves = torch.sin(places @ self.frequencies.T + self.phases) * self.amplitudes
        return places, waves.sum(1, keepdim=True)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        inputs, signal = batch  # (N, d), (N, 1)
        if not self.sine:
            angles = inputs @ self.projection
            inputs = torch.cat((torch.sin(angles), torch.cos(angles)), 1)
        return (self.net(params, inputs) - signal).square().mean((1, 2))
