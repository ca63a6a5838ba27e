"""Functions that rules share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learned_optim.kernels.constants import TINY

# The derivative of a root's inverse, its cube, overflows float32 where the root is below 1e-13.
_LEAST_DIFFERENTIABLE = 1e-12


def inverse_root(square: Tensor) -> Tensor:
    """1 / sqrt(square + TINY^2), whose derivative is 0 for roots below 1e-12.

    Without that, coordinates whose gradients have all been exactly zero, as those of pixels that
    are always black, would turn meta-gradients with second derivatives into 0 * inf.
    """
    if square.requires_grad:
        live = square > _LEAST_DIFFERENTIABLE**2
        square = torch.where(live, square, square.detach())
    return (square + TINY**2).rsqrt()


def log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), clamped to [-16, 16], so that zero has a value."""
    return (x / reference).clamp(min=math.exp(-16.0), max=math.exp(16.0)).log()


def bias_correction(step: Tensor, *betas: float) -> Tensor:
    """Bias corrections ``1 - beta^t`` of running means, ``(len(betas), *S)``.

    ``step``, of any shape ``S``, is the number of updates, this one included.
    """
    # expm1 keeps the digits that 1 - beta^t would lose while beta^t is near 1.
    return torch.stack([-torch.expm1(step * math.log(beta)) for beta in betas])


def largest_momentum(beta: float, square_beta: float) -> float:
    """Bound of a momentum over the root of a mean square of the same gradients."""
    return (1 - beta) / math.sqrt((1 - square_beta) * (1 - beta**2 / square_beta))


def momentum_before(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    """``beta`` times the momentum before ``grad``; rounding errors count as zero."""
    own = (1 - beta) * grad
    old = momentum.squeeze(-1) - own
    rounding = 8 * torch.finfo(grad.dtype).eps
    return torch.where(old.abs() > rounding * own.abs(), old, torch.zeros_like(old))


def zeros_by_column(param: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``(*param.shape, k)``, of which each of the ``k`` columns is contiguous in memory."""
    like = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    if k == 1:  # with the strides of a new tensor
        return like.unsqueeze(-1)
    return like.unsqueeze(0).repeat(k, *(1,) * param.dim()).movedim(0, -1)
