"""Populations: ``B`` copies of one network that train side by side.

Each copy trains under other weights of the update rule. Parameters are stacked, and losses are
written for stacked parameters: a step of all copies is one pass of batched matrix products.

The order of random draws is part of a family's definition: a seed stands for a task, and references
and states of unfinished trainings are kept by seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor

#: Named parameters: of one copy where a task makes them, with a leading ``B`` where it reads them.
Params: TypeAlias = dict[str, Tensor]
#: What ``batch`` hands to ``losses``: shared by all copies, which differ in their weights alone.
Batch: TypeAlias = tuple[Any, ...]


def copies_of(initial: Params, count: int) -> Params:
    """The parameters of ``count`` copies, float32 leaves of shape ``(count, *shape)``."""
    return {
        name: value.detach().float().unsqueeze(0).repeat(count, *[1] * value.dim()).requires_grad_()
        for name, value in initial.items()
    }


class UnusableTaskError(ValueError):
    """A draw that gave no task to train on; the mixture draws again."""


class Population(ABC):
    """One training problem, for any number of copies at once.

    The constructor of a subclass, ``Family(draw, data)``, draws data, sizes and initialization;
    synthetic data ignores ``data``. A subclass defines :meth:`batch` and :meth:`loss`, and
    :meth:`init` unless its parameters are those of ``net``. Callers use :meth:`initial`,
    :meth:`batch` and :meth:`losses`, which add scales.

    Attributes:
        batch_size: examples per step.
        longest_run: steps that a run may take at most.
        scales: positive divisors of the stored parameters, by name, or None. They change gradients
            and not the function: a rule must not depend on a tensor's units (Wichrowska et al.
            2017, section 3.4).
        jitter: standard deviation of the log of a random factor on the loss of every step.
        held_out: a batch of examples that no other batch has, or None.
    """

    batch_size: int = 1
    longest_run: ClassVar[int] = 2000
    scales: dict[str, float] | None = None
    jitter: float = 0.0
    held_out: Batch | None = None
    net: Any  # a Perceptron

    def init(self, generator: Generator) -> Params:
        """Initial parameters of one copy, in the task's own units."""
        params: Params = self.net.init(generator)
        return params

    @abstractmethod
    def batch(self, generator: Generator) -> Batch:
        """The batch of the next step, the same for all copies."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """:meth:`losses` of parameters in the task's own units."""

    @property
    def name(self) -> str:
        """What was drawn, for logs."""
        return type(self).__name__

    @property
    def rows(self) -> int:
        """Rows of a step's matrix products, for the mixture's estimate of cost."""
        return self.batch_size

    def reset(self) -> None:  # noqa: B027 - not abstract: most tasks do not change
        """Go back to the first step, in tasks that change as they run."""

    def initial(self, generator: Generator) -> Params:
        """Initial parameters of one copy, float32, without the leading dimension; a new run."""
        self.reset()
        params = self.init(generator)
        if self.scales is None:
            return params
        return {name: value / self.scales[name] for name, value in params.items()}

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """The loss of every copy.

        Args:
            params: every tensor of shape ``(B, *shape)``.
            batch: what :meth:`batch` returned.

        Returns:
            Shape ``(B,)``; entry ``b`` depends on ``params[name][b]`` alone.
        """
        if self.scales is not None:
            params = {name: value * self.scales[name] for name, value in params.items()}
        return self.loss(params, batch)


def draw_index(weights: Tensor | None, of: int, size: int, generator: Generator) -> Tensor:
    """``size`` indices below ``of``, int64, with repetition; by weights if there are any."""
    if weights is None:
        return torch.randint(of, (size,), generator=generator)
    return torch.multinomial(weights, size, True, generator=generator)
