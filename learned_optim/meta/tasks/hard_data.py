"""Data that is hard in itself: wrong labels, heavy tails, rare classes.

Two fifths of FashionMNIST's labels are replaced by random ones (the held-out ones are right). The
heavy-tailed regression has inputs with log-normal scales and noise of Student's t with 2 degrees
of freedom, under Huber's loss. The rare-class problem has 200 classes of which the k-th is drawn
with a frequency in proportion to 1 / k, on which SGD falls behind Adam (Kunstner et al. 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, draws, first_images
from learned_optim.meta.tasks.images import mlp

BATCH_SIZE = 64
WRONG, NOISY_IMAGES, HELD_OUT = 0.4, 10_000, 2000
CLASSES, FEATURES = 200, 32


def _noisy_labels(data: DataOptions) -> ModuleTask:
    clean, generator = first_images("fashion", True, data, NOISY_IMAGES), draws(1)
    wrong = torch.rand(NOISY_IMAGES, generator=generator) < WRONG
    other = torch.randint(10, (NOISY_IMAGES,), generator=generator)
    noisy = Examples(clean.inputs, torch.where(wrong, other, clean.targets))
    return ModuleTask(
        lambda: mlp(784, (64, 64), 10, nn.ReLU),
        noisy.batches(BATCH_SIZE),
        tests=first_images("fashion", False, data, HELD_OUT).all,
    )


def _heavy_tails(data: DataOptions) -> ModuleTask:
    generator = draws(2)
    count = 6000
    scales = torch.randn(count, 1, generator=generator).exp()
    x = scales * torch.randn(count, 20, generator=generator)
    hidden = torch.tanh(x @ torch.randn(20, 8, generator=generator) / 4.5)
    clean = 2.0 * hidden @ torch.randn(8, 1, generator=generator)
    # Student's t with 2 degrees of freedom: a normal over the root of a mean of two squares.
    squares = torch.randn(count, 2, generator=generator).square().mean(1, keepdim=True)
    noise = torch.randn(count, 1, generator=generator) / squares.sqrt()
    examples = Examples(x, clean + 0.3 * noise)
    return examples.task(lambda: mlp(20, (64, 64), 1, nn.ReLU), BATCH_SIZE, F.huber_loss)


def _rare_classes(data: DataOptions) -> ModuleTask:
    generator = draws(3)
    count = 20_000
    frequency = 1.0 / torch.arange(1, CLASSES + 1)
    labels = torch.multinomial(frequency, count, replacement=True, generator=generator)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    inputs = centres[labels] + 1.2 * torch.randn(count, FEATURES, generator=generator)
    return Examples(inputs, labels).task(lambda: mlp(FEATURES, (128,), CLASSES, nn.ReLU), 128)


FAMILIES = {
    "noisy-labels": EvaluationTask(_noisy_labels, steps=4000, quick=1000, data_set="fashion"),
    "heavy-tails": EvaluationTask(_heavy_tails, steps=4000, quick=1000),
    "rare-classes": EvaluationTask(_rare_classes, steps=5000, quick=1000),
}
