"""Labelled examples in memory: a fixed split, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.tasks._base import Batch, ModuleTask


@dataclass(frozen=True)
class Examples:
    """Inputs and targets with one row per example."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self, held_out: float = 0.2) -> tuple[Examples, Examples]:
        """Training and held-out examples, in an order that depends on their number alone."""
        order = torch.randperm(len(self), generator=draws(0))
        train, rest = order.tensor_split([int(len(self) * (1.0 - held_out))])
        return (
            Examples(self.inputs[train], self.targets[train]),
            Examples(self.inputs[rest], self.targets[rest]),
        )

    def batches(self, size: int) -> Callable[[Generator], Batch]:
        """A source of ``size`` random examples, drawn with replacement."""

        def draw(generator: Generator) -> Batch:
            index = torch.randint(len(self), (size,), generator=generator)
            return self.inputs[index], self.targets[index]

        return draw

    def task(
        self,
        build: Callable[[], nn.Module],
        size: int,
        criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        held_out: float = 0.2,
    ) -> ModuleTask:
        """The training of a network on batches of ``size``, with a share of examples held out."""
        train, rest = self.split(held_out)
        return ModuleTask(build, train.batches(size), criterion, tests=rest.all)

    def all(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, as a task's held-out set is given."""
        return self.inputs, self.targets


def first_images(name: str, train: bool, data: DataOptions, count: int | None = None) -> Examples:
    """The first ``count`` images, or all, float32 ``(N, C, H, W)``, with labels."""
    images = load_images(name, train, data)
    return Examples(*images.batch(torch.arange(len(images))[:count]))


def standardized(x: Tensor) -> Tensor:
    """Columns at mean 0 and standard deviation 1; constant columns become 0."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-8)


def noised(rows: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows ``(N, F)`` mixed with a random share of noise, and the noise.

    Mixture and share, ``(N, F + 1)``, and the noise, ``(N, F)``, are input and target of a denoiser
    (Ho et al. 2020).
    """
    share = torch.rand(len(rows), 1, generator=generator)
    noise = torch.randn(rows.shape, generator=generator)
    mixed = (1.0 - share).sqrt() * rows + share.sqrt() * noise
    return torch.cat((mixed, share), 1), noise


def draws(seed: int) -> Generator:
    """The generator of a synthetic data set, the same in every process."""
    return Generator().manual_seed(seed)
