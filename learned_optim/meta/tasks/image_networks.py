"""Convolutional and residual networks and a vision transformer on images, for evaluation.

All start from PyTorch's initialization. Batch norm's running statistics are buffers of the module
and used in its test. The residual network (He et al. 2016, 90,000 parameters) and the transformer
(Dosovitskiy et al. 2021) train on batches of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta.tasks._base import EvaluationTask
from learned_optim.meta.tasks.images import Shape, image_family, image_task
from learned_optim.meta.tasks.language import Block

BATCH_SIZE = 32
HELD_OUT = 2000


def convnet(
    shape: Shape, classes: int, widths: tuple[int, int] = (8, 16), batch_norm: bool = False
) -> nn.Module:
    """Two blocks of 3x3 convolution, optional batch norm, ReLU and 2x2 max-pooling; then linear.

    ``widths`` are the channels of the two convolutions.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for planes in widths:
        layers.append(nn.Conv2d(channels, planes, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(planes))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = planes, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a 1x1 convolution, ReLU after each."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, planes, 1, stride, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A block at stride 2 for each width, global average pooling, linear."""

    def __init__(self, shape: Shape, classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        channels = pairwise((shape[0], *widths))
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 2) for a, b in channels))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(4.0 * x - 2.0).mean((2, 3)))


class VisionTransformer(nn.Module):
    """``side`` by ``side`` patches, pre-norm blocks with four heads, the tokens' mean; linear.

    Position embeddings have a standard deviation of 0.02.
    """

    def __init__(
        self, shape: Shape, classes: int, width: int = 64, depth: int = 2, side: int = 4
    ) -> None:
        super().__init__()
        self.patch = shape[1] // side
        self.embed = nn.Linear(shape[0] * self.patch**2, width)
        self.place = nn.Parameter(0.02 * torch.randn(side**2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(4.0 * x - 2.0, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.blocks(self.embed(patches) + self.place)  # (batch, side^2, width)
        return self.head(self.norm(tokens).mean(1))


def _small(image_set: str, network: Callable[[Shape, int], nn.Module]) -> EvaluationTask:
    make = partial(image_task, image_set, network, batch_size=BATCH_SIZE, held_out=HELD_OUT)
    return EvaluationTask(make, steps=2000, quick=400, data_set=image_set)


_normed = partial(convnet, batch_norm=True)
FAMILIES = {
    "mnist-cnn": partial(image_family, "mnist", convnet),
    "mnist-cnn-bn": partial(image_family, "mnist", _normed, stackable=False),
    "cifar10-cnn": partial(image_family, "cifar10", convnet),
    "cifar10-cnn-bn": partial(image_family, "cifar10", _normed, stackable=False),
    **{f"{name}-resnet": _small(name, ResNet) for name in ("cifar10", "fashion")},
    **{f"{name}-vit": _small(name, VisionTransformer) for name in ("cifar10", "fashion")},
}
