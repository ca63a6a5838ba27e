"""Image classification by small convolutional networks, on the meta half of MNIST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._layers import (
    ACTIVATIONS,
    CLASSES,
    batch_norm,
    cross_entropy,
    init_weight,
    linear,
    meta_images,
)
from learned_optim.meta.populations.classification import wrong_labels
from learned_optim.meta.sampler import Sampler

# Rows of matrix products that an image counts for in the cost of a step.
POSITIONS = 60


class ConvNet(Population):
    """Small convolutional networks, with or without batch normalization and residual blocks.

    The copies share one grouped convolution: activations are ``(N, B * channels, side, side)``.
    """

    longest_run = 800

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        self.side = draw.choice([7, 14], [1, 2])
        self.images, self.labels = meta_images(data, self.side)
        self.batch_size = draw.batch_size(8, 48)
        shares = [0.2, 1, 2, 2, 2] if draw.large else None
        self.channels = draw.choice([4, 8, 16, 24, 32], shares)
        self.depth = draw.choice([1, 2, 3])
        self.normalized = draw.chance(0.5)
        self.residual = draw.chance(0.4)
        self.wrong_share = draw.choice([0, 0.2], [3, 1])
        self.init_kind = draw.choice(["torch", "he"])
        self.activation = draw.choice(["relu", "silu", "gelu"], [3, 1, 1])
        self.pooled = draw.chance(0.5)

    @property
    def rows(self) -> int:
        return self.batch_size * POSITIONS

    def init(self, generator: Generator) -> Params:
        params: Params = {}
        inputs = 1
        for layer in range(self.depth):
            shape = (self.channels, inputs, 3, 3)
            params[f"weight{layer}"] = init_weight(shape, self.init_kind, generator)
            if self.normalized:
                params[f"gain{layer}"] = torch.ones(self.channels)
                params[f"shift{layer}"] = torch.zeros(self.channels)
            else:
                params[f"bias{layer}"] = torch.zeros(self.channels)
            inputs = self.channels
        positions = 1 if self.pooled else ((self.side + 1) // 2) ** 2
        features = self.channels * positions
        params["head"] = init_weight((CLASSES, features), "torch", generator)
        params["head_bias"] = torch.zeros(CLASSES)
        return params

    def batch(self, generator: Generator) -> Batch:
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        labels = wrong_labels(self.labels[index], self.wrong_share, generator)
        return self.images[index], labels

    def loss(self, params: Params, batch: Batch) -> Tensor:
        images, labels = batch  # (N, 1, side, side), (N,)
        copies = params["head"].shape[0]
        hidden = images.expand(self.batch_size, copies, self.side, self.side)
        for layer in range(self.depth):
            out = F.conv2d(
                hidden,
                params[f"weight{layer}"].flatten(0, 1),
                None if self.normalized else params[f"bias{layer}"].flatten(),
                padding=1,
                stride=2 if layer == 0 else 1,
                groups=copies,
            )
            if self.normalized:
                gain, shift = (
                    params[f"{name}{layer}"].reshape(1, -1, 1, 1) for name in ("gain", "shift")
                )
                out = batch_norm(out, gain, shift, dims=(0, 2, 3))
            out = ACTIVATIONS[self.activation](out)
            hidden = hidden + out if self.residual and layer > 0 else out
        features = hidden.unflatten(1, (copies, self.channels)).transpose(0, 1)  # (B, N, c, s, s)
        features = features.mean((3, 4)) if self.pooled else features.flatten(2)
        return cross_entropy(linear(features, params["head"], params["head_bias"]), labels)
