"""Coordinate networks: a photograph as a function of the position in it.

Sine activations in the initialization of Sitzmann et al. (2020), and ReLU on Fourier features
(Tancik et al. 2020), on a photograph that scikit-learn ships, at a quarter of its resolution. A
tenth of the pixels is held out; colours are in [-1, 1] and the loss is the mean squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim._extras import import_extra
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, draws

BATCH_SIZE = 512
FREQUENCY = 30.0  # omega_0 of Sitzmann et al.


class Sine(nn.Module):
    """``sin(30 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(FREQUENCY * x)


def sine_network(inputs: int = 2, outputs: int = 3, width: int = 64, hidden: int = 2) -> nn.Module:
    """Sine layers in their authors' initialization, and a linear layer."""
    layers: list[nn.Module] = []
    for index, fan_in in enumerate([inputs] + [width] * hidden):
        linear = nn.Linear(fan_in, width if index < hidden else outputs)
        bound = 1.0 / fan_in if index == 0 else math.sqrt(6.0 / fan_in) / FREQUENCY
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, Sine()]
    return nn.Sequential(*layers[:-1])


class FourierFeatures(nn.Module):
    """Sines and cosines of 64 fixed random frequencies of standard deviation 5."""

    frequencies: Tensor

    def __init__(self, inputs: int = 2, count: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 5.0 * torch.randn(inputs, count, generator=draws(0)))

    def forward(self, x: Tensor) -> Tensor:
        angles = math.pi * x @ self.frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)


def fourier_network() -> nn.Module:
    """Fourier features, two ReLU layers of 64 and a linear layer."""
    body = (nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return nn.Sequential(FourierFeatures(), *body)


@lru_cache(maxsize=1)
def _pixels() -> Examples:
    """Positions in [-1, 1]^2 and colours in [-1, 1]^3 of the photograph."""
    photograph = import_extra("sklearn.datasets").load_sample_image("china.jpg")
    image = torch.tensor(photograph).float() / 127.5 - 1.0  # (427, 640, 3)
    image = F.avg_pool2d(image.permute(2, 0, 1), 4).permute(1, 2, 0)  # (106, 160, 3)
    axes = [torch.linspace(-1.0, 1.0, size) for size in image.shape[:2]]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return Examples(positions.flatten(0, 1), image.flatten(0, 1))


def _photograph(build: Callable[[], nn.Module], data: DataOptions) -> ModuleTask:
    return _pixels().task(build, BATCH_SIZE, F.mse_loss, held_out=0.1)


FAMILIES = {
    f"coordinates-{name}": EvaluationTask(partial(_photograph, network), steps=4000, quick=1000)
    for name, network in (("sine", sine_network), ("fourier", fourier_network))
}
