"""The schedule of a rule that knows how far the run is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LAST_RATE = 0.01
_SHORTEST_WARMUP, _LONGEST_WARMUP = 10.0, 250.0


def rate_schedule(
    step: Tensor, total_steps: float | Tensor | None, warmup_share: float, warmup_steps: int
) -> Tensor:
    """Linear warm-up to 1; where the length of the run is known, a cosine to its end as well.

    Args:
        step: number of earlier updates of each tensor, ``(m,)``.
        total_steps: length of the run, ``()`` or ``(m,)``; ``None`` if unknown.
        warmup_share: warm-up in units of the length, between 10 and 250 steps.
        warmup_steps: warm-up where the length is unknown.

    Returns:
        Shape ``(m,)``; from the last step on 0.01.
    """
    if total_steps is None:
        return ((step + 1) / warmup_steps).clamp(max=1.0)
    total = total_steps * torch.ones_like(step)
    warmup = (warmup_share * total).clamp(_SHORTEST_WARMUP, _LONGEST_WARMUP)
    angle = math.pi * ((step + 1) / (total + 1)).clamp(max=1.0)
    fall = (0.5 * (1.0 + angle.cos())).clamp(min=_LAST_RATE)
    return ((step + 1) / warmup).clamp(max=1.0) * fall
