"""A small vision transformer on CIFAR-10 and FashionMNIST (Dosovitskiy et al. 2021).

Sixteen patches, two pre-norm blocks of width 64 with four heads, the mean of the tokens into a
linear layer; position embeddings of standard deviation 0.02. Batches of 32 images.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.tasks._base import Horizon, ModuleTask, TaskOptions, evaluation_family
from learned_optim.meta.tasks.images import image_batches, image_test_set
from learned_optim.meta.tasks.language import Block

BATCH_SIZE = 32
HELD_OUT = 2000


class VisionTransformer(nn.Module):
    """Logits ``(batch, classes)`` of images ``(batch, channels, side, side)`` in [0, 1]."""

    def __init__(self, channels: int, side: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.patch = side // 4
        self.embed = nn.Linear(channels * self.patch**2, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(4.0 * x - 2.0, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.blocks(self.embed(patches) + self.place)  # (batch, 16, width)
        return self.head(self.norm(tokens).mean(1))


def _transformer(image_set: str, data: DataOptions) -> ModuleTask:
    images = load_images(image_set, True, data)
    channels, side, _ = images.shape
    return ModuleTask(
        build=lambda: VisionTransformer(channels, side, images.classes),
        batches=image_batches(image_set, TaskOptions(data=data), BATCH_SIZE),
        tests=lambda: image_test_set(image_set, data, HELD_OUT),
    )


FAMILIES = {
    f"{name}-vit": evaluation_family(f"{name}-vit", partial(_transformer, name), name)
    for name in ("cifar10", "fashion")
}
FIELD = {"cifar10-vit": Horizon(2000, 400), "fashion-vit": Horizon(2000, 400)}
