"""Labelled examples in memory: a fixed split into training and held-out ones, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learned_optim.meta.tasks._base import Batch

#: Fewer examples than this on either side of a split say nothing about an optimizer.
FEWEST = 16


@dataclass(frozen=True)
class Examples:
    """Inputs and targets with one row per example."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, index: Tensor) -> Examples:
        """The examples at ``index`` (int64, shape ``(M,)``)."""
        return Examples(self.inputs[index], self.targets[index])

    def split(self, held_out: float = 0.2) -> tuple[Examples, Examples]:
        """Training and held-out examples, in an order that depends on their number alone.

        Raises:
            ValueError: too few examples on one side.
        """
        order = torch.randperm(len(self), generator=Generator().manual_seed(0))
        cut = int(len(self) * (1.0 - held_out))
        if min(cut, len(self) - cut) < FEWEST:
            raise ValueError(
                f"{len(self)} examples leave {cut} to train on and {len(self) - cut} held out: at "
                f"least {FEWEST} of each are needed. Give a larger data set"
            )
        return self.at(order[:cut]), self.at(order[cut:])

    def batches(self, size: int) -> Callable[[Generator], Batch]:
        """A source of ``size`` random examples, drawn with replacement."""

        def draw(generator: Generator) -> Batch:
            index = torch.randint(len(self), (size,), generator=generator)
            return self.inputs[index], self.targets[index]

        return draw

    def all(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, as a task's held-out set is given."""
        return self.inputs, self.targets


def standardized(x: Tensor) -> Tensor:
    """``x`` with columns of mean 0 and standard deviation 1; constant columns become 0."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-8)


def draws(seed: int) -> Generator:
    """The generator of a data set that is made up: the same in every process."""
    return Generator().manual_seed(seed)
