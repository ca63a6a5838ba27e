"""What is handed to a rule at a step: its state, and what else it may know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a rule may know of a step besides gradients, state and parameters.

    Attributes:
        step: number of earlier updates of each tensor, in the rule's dtype, shape ``(m,)``.
        loss: the loss at the parameters, shape ``()`` or, one per tensor, ``(m,)``; ``None``
            unless the rule has :attr:`UpdateRule.needs_loss`.
        total_steps: length of the run that the optimizer was told, a number or a tensor of shape
            ``()`` or ``(m,)``; ``None`` if it is unknown.
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

        of_all = self.loss, self.total_steps, self.rotated
        return StepContext(self.step[tensors], *map(part, of_all))


class BoundStep(Protocol):
    """A step in place whose parameters and state are known, see :meth:`UpdateRule.bind_step`."""

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool,
        warmup: int,
        total_steps: float | None,
    ) -> bool:
        """True if it is done; false, and nothing done, if :meth:`UpdateRule.step_` has to do it."""
