"""The arguments that every kernel takes: the tensors of a step, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StepTensors(NamedTuple):
    """The tensors of one step; see :func:`learned_optim.kernels.step_` for shapes and dtypes.

    Attributes:
        network: the five weights, shared, or with a leading ``m``.
        params: ``m`` parameters.
        grads: of the parameters.
        states: of the parameters, with the entries of :data:`STATE_KEYS`.
        shapes: of the parameters, if they are flattened, else ``None``.
        updates: float32 tensors that receive the updates of rotated matrices, whose parameters then
            only decay; ``None`` for the others, and for all if none is rotated.
    """

    network: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    shapes: Sequence[torch.Size] | None = None
    updates: Sequence[Tensor | None] | None = None


class StepSettings(NamedTuple):
    """The numbers of a step in place.

    Attributes:
        lr: multiplier of the update; a tensor has one element, on the device or the CPU.
        weight_decay: ``param *= 1 - 1e-3 * lr * weight_decay`` before the update, with what
            :meth:`UpdateRule.scheduled_decay` makes of it.
        maximize: negate the gradients.
        warmup: updates are multiplied by ``min(1, (step + 1) / warmup)``; 0 for none.
        total_steps: length of the run that a rule may know; ``None`` if it is unknown.
    """

    lr: float | Tensor = 1.0
    weight_decay: float = 0.0
    maximize: bool = False
    warmup: int = 0
    total_steps: float | None = None


def is_horizon(total_steps: object) -> bool:
    """True if the kernels take this length of the run: ``None``, or a finite positive number."""
    if total_steps is None:
        return True
    return not isinstance(total_steps, Tensor) and 0 < total_steps < math.inf  # type: ignore[operator]
