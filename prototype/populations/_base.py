"""What a population task is, and the random draws that make one.

A *population* is ``B`` copies of one network that train side by side, each under other weights of the
update rule. Their parameters are stacked, so one small step of all copies is one pass through
batched matrix products: the loss of a task is written for stacked parameters from the start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Generator, Tensor

T = TypeVar("T")

#: Named parameters: of one copy where a task makes them, with a leading ``B`` where it reads them.
Params: TypeAlias = dict[str, Tensor]
#: What ``batch`` hands to ``loss``: shared by all copies, so that they differ in weights alone.
Batch: TypeAlias = tuple[Any, ...]


class UnusableTaskError(Exception):
    """A draw that gave no task to train on; the mixture draws again."""


class PopulationTask(ABC):
    """One training problem, for any number of copies at once.

    A family is a subclass whose constructor, ``Family(draw, data)``, draws everything that sets one
    of its tasks apart: the data, the sizes, the initialization. Afterwards a task is constant.

    Attributes:
        name: what was drawn, for logs.
        longest_run: steps that a run of this task may take at most, by what a step costs.
    """

    name: str
    longest_run: int = 2000

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Initial parameters of one copy, without the leading dimension."""

    @abstractmethod
    def batch(self, generator: Generator) -> Batch:
        """The batch of the next step, the same for all copies."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The loss of every copy.

        Args:
            params: every tensor of shape ``(B, *shape)``.
            batch: what :meth:`batch` returned.

        Returns:
            Shape ``(B,)``; entry ``b`` depends on ``params[name][b]`` alone.
        """


class Reparametrized(PopulationTask):
    """A task whose every tensor is stored divided by a factor of its own.

    The function is the same and its gradients are not: what a rule learns must not hang on the
    units in which a tensor happens to be written (Wichrowska et al. 2017, section 3.4).

    Args:
        task: the task as drawn.
        factors: one positive number per parameter.
    """

    def __init__(self, task: PopulationTask, factors: dict[str, float]) -> None:
        self.task, self.factors = task, factors
        self.name, self.longest_run = f"{task.name} reparametrized", task.longest_run

    def init(self, generator: Generator) -> Params:
        params = self.task.init(generator)
        return {name: value / self.factors[name] for name, value in params.items()}

    def batch(self, generator: Generator) -> Batch:
        return self.task.batch(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        scaled = {name: value * self.factors[name] for name, value in params.items()}
        return self.task.loss(scaled, batch)


class Sampler:
    """Random draws from one generator, one call each.

    Example:
        >>> draw = Sampler(torch.Generator().manual_seed(0))
        >>> 8 <= draw.log_uniform(8, 512) <= 512
        True
        >>> draw.choice(["relu", "tanh"], [3, 1]) in ("relu", "tanh")
        True
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from ``[low, high)``."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def log_uniform(self, low: float, high: float) -> float:
        """A positive number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def log_integer(self, low: float, high: float) -> int:
        """:meth:`log_uniform`, rounded down: sizes and lengths."""
        return int(self.log_uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options, all alike or in proportion to the weights."""
        if weights is None:
            return options[self.integer(0, len(options) - 1)]
        shares = torch.tensor(weights, dtype=torch.float)
        return options[int(torch.multinomial(shares, 1, generator=self.generator))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def subset(self, size: int, of: int) -> Tensor:
        """``min(size, of)`` different indices below ``of``, int64, in random order."""
        return torch.randperm(of, generator=self.generator)[:size]
