"""Image classification by perceptrons, on the meta half of MNIST."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import (
    Batch,
    Params,
    Population,
    UnusableTaskError,
    draw_index,
)
from learned_optim.meta.populations._layers import CLASSES, cross_entropy, meta_images
from learned_optim.meta.populations._perceptron import Perceptron, draw_perceptron
from learned_optim.meta.sampler import Sampler


def wrong_labels(labels: Tensor, share: float, generator: Generator) -> Tensor:
    """Labels ``(N,)`` of which this share is replaced by random classes."""
    if not share:
        return labels
    chosen = torch.rand(len(labels), generator=generator) < share
    random = torch.randint(CLASSES, (len(labels),), generator=generator)
    return torch.where(chosen, random, labels)


class Classification(Population):
    """Perceptrons on whole or averaged images.

    Some tasks have few examples, wrong labels, rare classes or dropout.
    """

    longest_run = 3000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        side = draw.choice([7, 14, 28], [5, 4, 1.5])
        images, self.labels = meta_images(data, side)
        self.pixels = images.flatten(1)  # (examples, side * side)
        if draw.chance(0.15):
            few = draw.subset(draw.log_integer(64, 4096), len(self.pixels))
            self.pixels, self.labels = self.pixels[few], self.labels[few]
        if draw.chance(0.3):
            self.pixels = (self.pixels - self.pixels.mean()) / self.pixels.std()
        self.wrong_share = draw.choice([0, 0.1, 0.3], [7, 1, 1])
        self.batch_size = draw.batch_size(8, 256 if side < 28 else 128)
        self.net = draw_perceptron(draw, self.pixels.shape[1], CLASSES)
        self.smoothing = draw.choice([0, 0.1], [9, 1])
        if self.net.norm == "batch":
            self.batch_size = max(self.batch_size, 16)
        # Rare classes: a class is drawn the less, the larger its label.
        rare = draw.chance(0.1)
        self.example_weights = 1 / (1 + self.labels.float()) ** 2 if rare else None

    def batch(self, generator: Generator) -> Batch:
        size = self.batch_size
        index = draw_index(self.example_weights, len(self.pixels), size, generator)
        labels = wrong_labels(self.labels[index], self.wrong_share, generator)
        return self.pixels[index], labels, self.net.masks(size, generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        pixels, labels, masks = batch
        return cross_entropy(self.net(params, pixels, masks), labels, self.smoothing)


class WideClassification(Classification):
    """Classification with a hidden layer of 512 to 2,048 units, alone or before a narrower one.

    Narrow layers do not teach the step size of sums over so many units.
    """

    longest_run = 1000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        super().__init__(draw, data)
        inputs = self.pixels.shape[1]
        hidden = [draw.log_integer(512, 2049)]
        if draw.chance(0.3):
            hidden.append(draw.log_integer(16, 129))
        activation = draw.choice(["relu", "tanh", "gelu"], [3, 1, 1])
        init = draw.choice(["torch", "he", "xavier", "small"], [4, 1, 1, 1])
        norm = draw.choice(["none", "layer"], [3, 1])
        self.net = Perceptron(inputs, CLASSES, hidden, activation, init, norm)


class FewExamples(Classification):
    """Classification with 64 to 2,048 examples; 512 others are held out."""

    longest_run = 2000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        super().__init__(draw, data)
        if len(self.pixels) < 1024:
            raise UnusableTaskError("no examples are left to hold out")
        count = draw.log_integer(64, min(2048, len(self.pixels) - 512))
        chosen = draw.subset(count + 512, len(self.pixels))
        few, others = chosen[:count], chosen[count:]
        self.held_out = self.pixels[others], self.labels[others], None
        self.pixels, self.labels = self.pixels[few], self.labels[few]
        self.example_weights = None


class DeepClassification(Classification):
    """Classification by 8 to 20 layers without normalization or residual connections."""

    longest_run = 1000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        super().__init__(draw, data)
        inputs, width = self.pixels.shape[1], draw.log_integer(24, 97)
        hidden = [width] * draw.integer(8, 20)
        kinds = [("relu", "he"), ("relu", "torch"), ("tanh", "xavier"), ("leaky", "he")]
        activation, init = draw.choice([*kinds, ("gelu", "he")], [5, 1, 2, 1, 1])
        self.net = Perceptron(inputs, CLASSES, hidden, activation, init)
