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
        lr_scales: a multiplier of ``lr`` for each parameter, or ``None``.
        updates: float32 tensors that receive the updates of some parameters, which then only decay;
            ``None`` for a parameter that is updated, and for all of them.
    """

    network: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    shapes: Sequence[torch.Size] | None = None
    lr_scales: Sequence[float] | None = None
    updates: Sequence[Tensor | None] | None = None


class StepSettings(NamedTuple):
    """The numbers of one step; see :func:`learned_optim.kernels.step_`.

    Attributes:
        config: of the rule, sixteen numbers.
        lr: a number, or a tensor of one element.
        decay: of the weights, in units of ``lr`` times trust and a power of the rule's schedule.
        maximize: negate the gradients.
        warmup: steps of the optimizer's ramp, 0 for none.
        total_steps: length of the run, 0 if it is unknown.
    """

    config: Sequence[float]
    lr: float | Tensor = 1.0
    decay: float = 0.0
    maximize: bool = False
    warmup: int = 0
    total_steps: float = 0.0


def is_horizon(total_steps: object) -> bool:
    """True if the kernels take this length of the run: ``None``, or a finite positive number."""
    if total_steps is None:
        return True
    return not isinstance(total_steps, Tensor) and 0 < total_steps < math.inf  # type: ignore[operator]
