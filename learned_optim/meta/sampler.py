"""Random draws that make tasks, each one call.

The order of draws is part of a task family's definition: a seed stands for a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

T = TypeVar("T")


class Sampler:
    """Random draws from one generator, one call each.

    Example:
        >>> draw = Sampler(torch.Generator().manual_seed(0))
        >>> 8 <= draw.log_uniform(8, 512) <= 512
        True
        >>> draw.choice(["relu", "tanh"], [3, 1]) in ("relu", "tanh")
        True
    """

    def __init__(self, generator: Generator, large: bool = False) -> None:
        self.generator = generator
        #: Whether sizes are drawn from the upper part of their range.
        self.large = large

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from ``[low, high)``."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def log_uniform(self, low: float, high: float) -> float:
        """A positive number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def log_integer(self, low: float, high: float) -> int:
        """:meth:`log_uniform`, rounded down: sizes and lengths."""
        return int(self.log_uniform(low, high))

    def width(self, low: int, high: int) -> int:
        """:meth:`log_integer` of units of a layer; at least ``4 * low`` if sizes are large."""
        return self.log_integer(min(4 * low, high // 2) if self.large else low, high)

    def batch_size(self, low: int, high: int) -> int:
        """:meth:`log_integer` of examples; twice as many if sizes are large, to ``2 * low``."""
        return self.log_integer(2 * low if self.large else low, high)

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
