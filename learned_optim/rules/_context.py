"""Arguments of a rule at a step: state, context, settings, shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from learned_optim.kernels import StepSettings

__all__ = ["Shards", "State", "StepContext", "StepFunction", "StepSettings"]

State = dict[str, Tensor]
#: A step of tensors that are already known, see :meth:`UpdateRule.bind`.
StepFunction: TypeAlias = Callable[[Sequence[Tensor], StepSettings], bool]


@dataclasses.dataclass(frozen=True)
class StepContext:
    """Inputs of a step besides gradients, state and parameters.

    Attributes:
        step: number of earlier updates of each tensor, in the rule's dtype, shape ``(m,)``.
        loss: the loss at the parameters, shape ``()`` or, one per tensor, ``(m,)``; ``None``
            unless the rule has :attr:`UpdateRule.needs_loss`.
        total_steps: length of the run, a number or a tensor of shape ``()`` or ``(m,)``; ``None``
            if it is unknown.
        rotated: 1 for matrices that are stepped in an eigenbasis, else 0, shape ``(m,)``; ``None``
            if there is none.
    """

    step: Tensor
    loss: Tensor | None = None
    total_steps: float | Tensor | None = None
    rotated: Tensor | None = None

    def of(self, tensors: slice) -> StepContext:
        """The context of some of the tensors."""

        def part(value: Any) -> Any:
            return value[tensors] if isinstance(value, Tensor) and value.dim() else value

        return StepContext(*map(part, (self.step, self.loss, self.total_steps, self.rotated)))


class Shards(NamedTuple):
    """The sharded tensors whose local parts a step takes.

    Attributes:
        shapes: of the whole tensors.
        groups: process groups over which all of them are sharded.
    """

    shapes: Sequence[torch.Size]
    groups: tuple[Any, ...]
