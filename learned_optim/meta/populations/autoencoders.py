"""Models of images without labels: autoencoders, variational ones, and denoisers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._layers import meta_images
from learned_optim.meta.populations._perceptron import Perceptron
from learned_optim.meta.sampler import Sampler
from learned_optim.meta.tasks._examples import noised


class Autoencoder(Population):
    """Perceptrons that restore images through a narrow code, or the noise that was added to them.

    The variational one (Kingma and Welling 2014) sums the binary cross entropy over pixels or
    averages the whole loss over them. The denoiser predicts the noise at a random level.
    """

    longest_run = 1500

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        side = draw.choice([7, 14], [2, 1])
        self.pixels = meta_images(data, side)[0].flatten(1)  # (examples, side * side)
        self.features = self.pixels.shape[1]
        self.batch_size = draw.batch_size(16, 128)
        self.kind = draw.choice(["plain", "variational", "denoiser"])
        width = draw.width(16, 96)
        self.code = draw.integer(2, 12)
        activation = draw.choice(["relu", "silu", "gelu", "tanh"])
        self.sums_pixels = draw.chance(0.5)
        init = draw.choice(["torch", "he", "xavier"])
        if self.kind == "denoiser":
            hidden = [width] * draw.integer(1, 3)
            output_init = "zero" if draw.chance(0.4) else None
            self.net = Perceptron(
                self.features + 1, self.features, hidden, activation, init, output_init=output_init
            )
            self.pixels = self.pixels * 2 - 1
        else:
            outputs = 2 * self.code if self.kind == "variational" else self.code
            self.encoder = Perceptron(
                self.features, outputs, [width], activation, init, prefix="encoder."
            )
            self.decoder = Perceptron(
                self.code, self.features, [width], activation, init, prefix="decoder."
            )

    def init(self, generator: Generator) -> Params:
        if self.kind == "denoiser":
            return self.net.init(generator)
        return self.encoder.init(generator) | self.decoder.init(generator)

    def batch(self, generator: Generator) -> Batch:
        index = torch.randint(len(self.pixels), (self.batch_size,), generator=generator)
        pixels = self.pixels[index]
        if self.kind == "denoiser":
            return noised(pixels, generator)
        return pixels, torch.randn(self.batch_size, self.code, generator=generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        pixels, noise = batch
        if self.kind == "denoiser":
            return (self.net(params, pixels) - noise).square().mean((1, 2))
        code = self.encoder(params, pixels)
        if self.kind == "plain":
            return (self.decoder(params, code) - pixels).square().mean((1, 2))
        mean, log_variance = code.chunk(2, -1)
        log_variance = log_variance.clamp(-8, 8)
        logits = self.decoder(params, mean + noise * torch.exp(log_variance / 2))
        target = pixels.expand_as(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        terms = mean.square() + log_variance.exp() - log_variance - 1
        bound = entropy.sum(-1).mean(1) + 0.5 * terms.sum(-1).mean(1)
        return bound if self.sums_pixels else bound / self.features
