"""Network inputs from gradients, whose magnitudes span many decades: pure functions."""

import math

import torch
from torch import Tensor


def log_and_sign(grad: Tensor, p: float = 10.0) -> Tensor:
    """Log-magnitude and sign of the gradient (Andrychowicz et al. 2016, appendix A).

    ``(log|g| / p, sign g)`` where ``|g| >= e^-p`` and ``(-1, e^p g)`` below, so the features are
    continuous at the threshold and linear in ``g`` under it. An infinite gradient reads as the
    largest finite one; NaN stays NaN.

    Args:
        grad: gradient, any shape ``S``, floating point.
        p: magnitudes below ``e^-p`` fade linearly to zero.

    Returns:
        Features of shape ``(*S, 2)``, same dtype: scaled log-magnitude, then sign.
    """
    magnitude = grad.abs()
    # The lower bound keeps log() away from zero; the upper one reads inf as the largest number.
    log_magnitude = magnitude.clamp(math.exp(-p), torch.finfo(grad.dtype).max).log() / p
    # clamp(e^p g, -1, 1) is sign(g) above the threshold and e^p g below it; exp(p) overflows in
    # half precision, so the factor goes in as two square roots.
    root = math.exp(p / 2)
    sign = (grad * root * root).clamp(-1.0, 1.0)
    return torch.stack((log_magnitude, sign), dim=-1)
