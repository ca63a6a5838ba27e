"""A small residual network with batch norm on CIFAR-10 and FashionMNIST (He et al. 2016).

Three stages of 16, 32 and 64 channels with one residual block each, at strides 2, 2 and 2, global
average pooling and a linear layer: 90,000 parameters in PyTorch's initialization. Batches of 32
images. Batch norm's running statistics are buffers of the module and used in its test.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.tasks._base import Horizon, ModuleTask, TaskOptions, evaluation_family
from learned_optim.meta.tasks.images import image_batches, image_test_set

BATCH_SIZE = 32
HELD_OUT = 2000


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
    """Logits ``(batch, classes)`` of images ``(batch, channels, height, width)`` in [0, 1]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 2) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(4.0 * x - 2.0).mean((2, 3)))


def _resnet(image_set: str, data: DataOptions) -> ModuleTask:
    images = load_images(image_set, True, data)
    return ModuleTask(
        build=lambda: ResNet(images.shape[0], images.classes),
        batches=image_batches(image_set, TaskOptions(data=data), BATCH_SIZE),
        tests=lambda: image_test_set(image_set, data, HELD_OUT),
    )


FAMILIES = {
    f"{name}-resnet": evaluation_family(f"{name}-resnet", partial(_resnet, name), name)
    for name in ("cifar10", "fashion")
}
FIELD = {"cifar10-resnet": Horizon(2000, 400), "fashion-resnet": Horizon(2000, 400)}
