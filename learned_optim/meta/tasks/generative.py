"""Networks that reproduce images: an autoencoder, a variational one and a denoiser.

Autoencoders (Kingma and Welling 2014 for the variational one) see FashionMNIST pooled to 14x14
pixels; the denoiser of a diffusion model (Ho et al. 2020) sees scikit-learn's digits, and its
output layer starts at zero as is usual there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, draws, first_images, noised

BATCH_SIZE = 64
HELD_OUT = 2000


def _reconstruction(
    build: Callable[[], nn.Module], criterion: Callable[[Tensor, Tensor], Tensor], data: DataOptions
) -> ModuleTask:
    def pooled(train: bool, count: int) -> Examples:
        images = first_images("fashion", train, data, count).inputs
        pixels = F.avg_pool2d(images, 2).flatten(1)  # (count, 196) in [0, 1]
        return Examples(pixels, pixels)

    train, held_out = pooled(True, 20_000), pooled(False, HELD_OUT)
    return ModuleTask(build, train.batches(BATCH_SIZE), criterion, tests=held_out.all)


def autoencoder() -> nn.Module:
    """Logits of the pixels through a linear code of 16 numbers: ``(batch, 196)``."""
    return nn.Sequential(
        nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 16), nn.Linear(16, 128), nn.ReLU(),
        nn.Linear(128, 196),
    )  # fmt: skip


class VariationalAutoencoder(nn.Module):
    """Logits of pixels, mean and log variance of the code: ``(batch, 196 + 2 * 8)``.

    The code is drawn in training and its mean in evaluation.
    """

    def __init__(self, pixels: int = 196, code: int = 8, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * code)
        )
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        mean, log_variance = encoded.chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        return torch.cat((logits, encoded), -1)


def negative_evidence(outputs: Tensor, pixels: Tensor) -> Tensor:
    """Negative evidence lower bound of a variational autoencoder, nats per image."""
    logits, encoded = outputs[:, : pixels.shape[1]], outputs[:, pixels.shape[1] :]
    mean, log_variance = encoded.chunk(2, -1)
    reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
    return (reconstruction + divergence) / len(pixels)


def denoising_network(width: int = 128) -> nn.Module:
    """Noise ``(batch, 64)`` of :func:`noised` digits; the output layer starts at zero."""
    head = nn.Linear(width, 64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    hidden = (nn.Linear(65, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
    return nn.Sequential(*hidden, head)


def _denoiser(data: DataOptions) -> ModuleTask:
    def digits(train: bool) -> Tensor:
        return 2.0 * first_images("digits", train, data).inputs.flatten(1) - 1.0

    train, held_out = Examples(digits(True), digits(True)).batches(BATCH_SIZE), digits(False)
    return ModuleTask(
        denoising_network,
        lambda generator: noised(train(generator)[0], generator),
        F.mse_loss,
        tests=lambda: noised(held_out, draws(0)),
    )


_plain = partial(_reconstruction, autoencoder, F.binary_cross_entropy_with_logits)
_variational = partial(_reconstruction, VariationalAutoencoder, negative_evidence)
FAMILIES = {
    "autoencoder": EvaluationTask(_plain, steps=5000, quick=1000, data_set="fashion"),
    "variational-autoencoder": EvaluationTask(
        _variational, steps=5000, quick=1000, data_set="fashion"
    ),
    "denoiser": EvaluationTask(_denoiser, steps=5000, quick=1000),
}
