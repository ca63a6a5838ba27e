"""What the shape of a tensor says of it; rules and their compiled kernel agree on it here."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Initial scale of vectors (biases, norm gains): a fan-in says nothing about them.
VECTOR_SCALE = 0.1


def init_scale(shape: Sequence[int]) -> float:
    """Scale at which a tensor of this shape is drawn: ``1 / sqrt(fan_in)``, 0.1 for vectors."""
    return VECTOR_SCALE if len(shape) < 2 else fan_in(shape) ** -0.5


def fan_in(shape: Sequence[int]) -> int:
    """Inputs per output, as torch counts them for linear and convolutional weights."""
    return max(1, math.prod(shape[1:]))
