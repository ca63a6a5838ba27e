# mypy: ignore-errors
# ruff: noqa: SIM300 (Triton reads the branches of a constant condition its own way)
"""What both Triton kernels share: the layout of their tables, and functions on single values."""

import math

import triton
import triton.language as tl

from learned_optim.kernels import constants as c

# Columns of the addresses, of the layout's integers and of its constants.
PARAM, GRAD, FAST, SLOW, SQUARE, STATS, STEP, UPDATE = map(tl.constexpr, range(8))
ADDRESSES: tl.constexpr = tl.constexpr(8)
SIZE, FIRST_CHUNK, CHUNKS = map(tl.constexpr, range(3))
INTEGERS: tl.constexpr = tl.constexpr(3)
INIT_SCALE, LOG_FAN_IN, IS_VECTOR = map(tl.constexpr, range(3))
CONSTANTS: tl.constexpr = tl.constexpr(3)
# A row of gains or of sums, the last entries unused.
ROW: tl.constexpr = tl.constexpr(16)

# Constants of the rule.
TINY2: tl.constexpr = tl.constexpr(c.TINY**2)
LOG_FAST: tl.constexpr = tl.constexpr(math.log(c.FAST_BETA))
LOG_SLOW: tl.constexpr = tl.constexpr(math.log(c.SLOW_BETA))
LOG_SQUARE: tl.constexpr = tl.constexpr(math.log(c.SQUARE_BETA))
LOG_SHORT: tl.constexpr = tl.constexpr(math.log(c.SHORT_BETA))
LOG_LONG: tl.constexpr = tl.constexpr(math.log(c.LONG_BETA))
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LARGEST_GRAD: tl.constexpr = tl.constexpr(c.LARGEST_GRAD)


@triton.jit(
    do_not_specialize=[
        "row", "param", "grad", "fast", "slow", "square", "stats", "step", "update"
    ]
)  # fmt: skip
def addresses_kernel(
    addresses, row, param: tl.int64, grad: tl.int64, fast: tl.int64, slow: tl.int64,
    square: tl.int64, stats: tl.int64, step: tl.int64, update: tl.int64,
):  # fmt: skip
    """Write a row of addresses, which a captured graph cannot copy from the host."""
    at = addresses + row * ADDRESSES
    tl.store(at + PARAM, param)
    tl.store(at + GRAD, grad)
    tl.store(at + FAST, fast)
    tl.store(at + SLOW, slow)
    tl.store(at + SQUARE, square)
    tl.store(at + STATS, stats)
    tl.store(at + STEP, step)
    tl.store(at + UPDATE, update)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def correction(log_beta, t):
    """1 - beta^t; float64 has digits enough for the difference."""
    return 1.0 - tl.exp(t * log_beta)


@triton.jit
def pick(row, k):
    """Entry ``k`` of a row in registers."""
    return tl.sum(tl.where(tl.arange(0, row.shape[0]) == k, row, 0.0), axis=0)


@triton.jit
def pointer(addresses, tensor, column, kind: tl.constexpr):
    address = tl.load(addresses + tensor * ADDRESSES + column)
    return address.to(tl.pointer_type(kind))


@triton.jit
def sanitized(grad, sign, PARAM_TYPE: tl.constexpr):
    """The gradient in float32; NaN and infinity count as zero, and large ones are cut off."""
    WIDE: tl.constexpr = tl.float64 if PARAM_TYPE == tl.float64 else tl.float32
    wide = grad.to(WIDE) * sign
    wide = tl.where(tl.abs(wide) < INFINITY, wide, 0.0)
    return clamp(wide, -LARGEST_GRAD, LARGEST_GRAD).to(tl.float32)


@triton.jit
def decayed(param, grad, decay, PARAM_TYPE: tl.constexpr):
    """The parameter after weight decay, which spares coordinates without a gradient, not rounded.

    float64 stays so, others widen: decay and update together are one rounding.
    """
    WIDE: tl.constexpr = tl.float64 if PARAM_TYPE == tl.float64 else tl.float32
    return param.to(WIDE) * tl.where(grad != 0.0, decay, 1.0).to(WIDE)
