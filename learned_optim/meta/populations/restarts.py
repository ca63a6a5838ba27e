"""Runs that begin with trained weights: more of the same, fine-tuning, and adapters."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population, UnusableTaskError
from learned_optim.meta.populations._layers import CLASSES, init_weight
from learned_optim.meta.populations.classification import Classification
from learned_optim.meta.populations.convolutions import ConvNet
from learned_optim.meta.populations.sequences import Sequences
from learned_optim.meta.populations.tabular import Teacher
from learned_optim.meta.sampler import Sampler


class Restart(Population):
    """Goes on from weights that Adam has trained for 100 to 400 steps.

    A perceptron on images goes on with the same task (``same``), or with few images: scaled,
    shifted and noisy (``shift``), the same with low-rank adapters of frozen weights (``adapter``,
    Hu et al. 2022), or with renamed classes (``labels``). Other networks keep their task.
    """

    longest_run = 600
    families: ClassVar[list[type[Population]]] = [Classification, Teacher, ConvNet, Sequences]

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        self.base = draw.choice(self.families, [4, 2, 1, 2])(draw, data)  # type: ignore[call-arg]
        self.mode = "same"
        if isinstance(self.base, Classification):
            modes = ["same", "shift", "adapter", "labels"]
            self.mode = draw.choice(modes, [2, 3, 3, 1])
        self.weights = self._trained(draw)
        if not all(bool(weight.isfinite().all()) for weight in self.weights.values()):
            raise UnusableTaskError("training diverged before the restart")
        if isinstance(self.base, Classification) and self.mode != "same":
            self._change_data(self.base, draw)
        self.rank = draw.choice([2, 4, 8])
        self.strength = draw.choice([1.0, 2.0, 4.0])

    def _trained(self, draw: Sampler) -> Params:
        generator = torch.Generator().manual_seed(draw.integer(0, 2**30))
        start = self.base.init(generator)
        params = {name: value[None].clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(params.values(), draw.log_uniform(7e-4, 5e-3))
        for _ in range(draw.integer(100, 400)):
            loss = self.base.loss(params, self.base.batch(generator)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.detach()[0] for name, value in params.items()}

    def _change_data(self, base: Classification, draw: Sampler) -> None:
        few = draw.subset(draw.log_integer(64, 2000), len(base.pixels))
        base.pixels, base.labels = base.pixels[few], base.labels[few]
        base.example_weights = None
        if self.mode == "labels":
            base.labels = (base.labels + draw.integer(1, CLASSES - 1)) % CLASSES
            return
        base.pixels = draw.uniform(0.5, 1.2) * base.pixels + draw.uniform(-0.3, 0.3)
        noise = torch.randn(base.pixels.shape, generator=draw.generator)
        base.pixels = base.pixels + 0.1 * noise

    @property
    def rows(self) -> int:
        return self.base.rows

    def reset(self) -> None:
        self.base.reset()

    def init(self, generator: Generator) -> Params:
        if self.mode != "adapter":
            return {name: weight.clone() for name, weight in self.weights.items()}
        params: Params = {}
        for name, weight in self.weights.items():
            if name.startswith("weight"):
                shape = (self.rank, weight.shape[1])
                params[f"down.{name}"] = init_weight(shape, "torch", generator)
                params[f"up.{name}"] = torch.zeros(weight.shape[0], self.rank)
        return params

    def batch(self, generator: Generator) -> Batch:
        return self.base.batch(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        if self.mode == "adapter":
            params = self._adapted(params)
        return self.base.loss(params, batch)

    def _adapted(self, params: Params) -> Params:
        copies = next(iter(params.values())).shape[0]
        adapted: Params = {}
        for name, weight in self.weights.items():
            if f"down.{name}" in params:
                change = torch.bmm(params[f"up.{name}"], params[f"down.{name}"])
                adapted[name] = weight + self.strength * change
            else:
                adapted[name] = weight.expand(copies, *weight.shape)
        return adapted
