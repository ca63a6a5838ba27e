# mypy: ignore-errors

"""The first launch of a step on a GPU: from statistics to the gains of each tensor."""

import triton
import triton.language as tl

from learned_optim.kernels import constants as c
from learned_optim.kernels._triton_common import (
    ADDRESSES,
    CONSTANTS,
    GRAD,
    INIT_SCALE,
    INTEGERS,
    IS_VECTOR,
    LOG_FAN_IN,
    LOG_FAST,
    LOG_LONG,
    LOG_SHORT,
    LOG_SLOW,
    LOG_SQUARE,
    PARAM,
    ROW,
    SIZE,
    STATS,
    STEP,
    UPDATE,
    clamp,
    correction,
    decayed,
    pick,
    pointer,
    sanitized,
    tanh,
)

LARGEST_COUNT: tl.constexpr = tl.constexpr(c.LARGEST_COUNT)
STEP_BOUND: tl.constexpr = tl.constexpr(c.STEP_BOUND)
MIX_BOUND: tl.constexpr = tl.constexpr(c.MIX_BOUND)
BASE_STEP: tl.constexpr = tl.constexpr(c.BASE_STEP)
LARGEST_SCALE: tl.constexpr = tl.constexpr(c.LARGEST_SCALE)
SMALLEST_SHARE: tl.constexpr = tl.constexpr(c.SMALLEST_SHARE)
DECAY_POWER: tl.constexpr = tl.constexpr(c.DECAY_POWER)
LAST_RATE: tl.constexpr = tl.constexpr(c.LAST_RATE)
WARMUP_SHARE: tl.constexpr = tl.constexpr(c.WARMUP_SHARE)
WARMUP_STEPS: tl.constexpr = tl.constexpr(c.WARMUP_STEPS)
SHORTEST_WARMUP: tl.constexpr = tl.constexpr(c.SHORTEST_WARMUP)
LONGEST_WARMUP: tl.constexpr = tl.constexpr(c.LONGEST_WARMUP)
INPUTS: tl.constexpr = tl.constexpr(23)
PI: tl.constexpr = tl.constexpr(3.141592653589793)


@triton.jit
def _first_rms(param, grad, size, decay, PARAM_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Root mean square of a whole tensor, by one program: once in a run."""
    total = tl.full((), 0.0, tl.float64)
    for at in range(0, size, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        values = tl.load(param + offsets, mask=offsets < size, other=0.0)
        g = sanitized(tl.load(grad + offsets, mask=offsets < size, other=0.0), 1.0, PARAM_TYPE)
        q = decayed(values, g, decay, PARAM_TYPE).to(tl.float32)
        total += tl.sum(q * q, axis=0).to(tl.float64)
    return tl.sqrt(total / tl.maximum(size, 1).to(tl.float64))


@triton.jit
def _inputs(
    z, t, rms, first, natural, log_fan_in, is_vector, size, total, rotated, WIDTH: tl.constexpr
):  # fmt: skip
    """The network's inputs ``(WIDTH,)`` in the order of ``step.cpp``, the last ones 0."""
    i = tl.arange(0, WIDTH)
    started = tl.where(t > 0, 1.0, 0.0)
    age = tl.maximum(t, 1.0)
    short = started / correction(LOG_SHORT, age)
    long = started / correction(LOG_LONG, age)
    known = tl.where(total > 0, 1.0, 0.0)
    length = tl.where(total > 0, total, 1.0)
    progress = known * tl.minimum(t / length, 1.0)
    x = tl.where(i == 0, tl.log(tl.maximum(rms / natural, 3.3546262790251185e-4)) / 4, 0.0)
    x = tl.where(i == 1, log_fan_in / 4 - 1, x)
    x = tl.where(i == 2, tl.log(tl.maximum(size, 1).to(tl.float64)) / 6 - 1, x)
    x = tl.where(i == 3, is_vector, x)
    x = tl.where(i == 4, tl.log(tl.minimum(t, LARGEST_COUNT) + 1) / 4 - 1, x)
    x = tl.where(i == 5, tl.exp(-t / 10), x)
    x = tl.where(i == 6, known, x)
    x = tl.where(i == 7, progress, x)
    x = tl.where(i == 8, known * tl.log(1.02 - progress) / 2, x)
    x = tl.where(i == 9, known * (tl.log(tl.minimum(length, LARGEST_COUNT)) / 4 - 1.5), x)
    for k in tl.static_range(5):  # shares, signals, inequality
        x = tl.where(i == 10 + k, started * pick(z, 4 + k) / 4, x)
    x = tl.where(i == 15, pick(z, 9) * short, x)
    x = tl.where(i == 16, pick(z, 10) * long, x)
    x = tl.where(i == 17, pick(z, 11) * short, x)
    x = tl.where(i == 18, started * tl.log(pick(z, 12) * short + 1e-3) / 4, x)
    moved = tl.log(tl.maximum(rms, 1e-8) / tl.maximum(first, 0.01 * natural)) / 2
    x = tl.where(i == 19, moved, x)
    x = tl.where(i == 20, started * (pick(z, 2) - pick(z, 3)) / 4, x)
    x = tl.where(i == 21, pick(z, 13) / 4, x)
    return tl.where(i == 22, rotated, x)


@triton.jit
def _respond(
    x, hidden, hidden_bias, readout, readout_bias, direct,
    UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The network's five outputs, ``(8,)``; a block of hidden units at a time."""
    BLOCK: tl.constexpr = 16
    i, o = tl.arange(0, WIDTH), tl.arange(0, 8)
    used = (o[:, None] < 5) & (i[None, :] < INPUTS)
    direct_weight = tl.load(direct + o[:, None] * INPUTS + i[None, :], mask=used, other=0.0)
    out = tl.sum(direct_weight.to(tl.float64) * x[None, :], axis=1)
    out += tl.load(readout_bias + o, mask=o < 5, other=0.0).to(tl.float64)
    for begin in range(0, UNITS, BLOCK):
        u = begin + tl.arange(0, BLOCK)
        into = (u[:, None] < UNITS) & (i[None, :] < INPUTS)
        out_of = (o[:, None] < 5) & (u[None, :] < UNITS)
        weight = tl.load(hidden + u[:, None] * INPUTS + i[None, :], mask=into, other=0.0)
        bias = tl.load(hidden_bias + u, mask=u < UNITS, other=0.0).to(tl.float64)
        h = tanh(bias + tl.sum(weight.to(tl.float64) * x[None, :], axis=1))
        back = tl.load(readout + o[:, None] * UNITS + u[None, :], mask=out_of, other=0.0)
        out += tl.sum(back.to(tl.float64) * h[None, :], axis=1)
    return out


@triton.jit
def _schedule(t, total):
    """Linear warm-up; with a known length of the run, a cosine to its end as well."""
    share = clamp(total * WARMUP_SHARE, SHORTEST_WARMUP, LONGEST_WARMUP)
    warmup = tl.where(total > 0, share, WARMUP_STEPS)
    fall = 0.5 * (1.0 + tl.cos(tl.minimum((t + 1) / (total + 1), 1.0) * PI))
    fall = tl.where(total > 0, tl.maximum(fall, LAST_RATE), 1.0)
    return tl.minimum((t + 1) / warmup, 1.0) * fall


@triton.jit
def gains_kernel(
    addresses, integers, constants, hidden, hidden_bias, readout, readout_bias, direct, lr_pointer,
    gains, counters, lr, weight_decay, total_steps, warmup,
    PARAM_TYPE: tl.constexpr, UNITS: tl.constexpr, OWN_NETWORKS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gains of one tensor, and what else the update needs to know of it.

    A row is: gains of fast, slow, gradient and cautious direction; factors on the three moments
    after this step and on both momenta before it; the factor of weight decay; whether to step.
    """
    tensor = tl.program_id(0)
    WIDTH: tl.constexpr = 32
    tl.store(counters + tensor, 0)
    if LR_ON_DEVICE:
        base_lr = tl.load(lr_pointer).to(tl.float64)
        active = tl.where(base_lr != 0, 1.0, 0.0)  # at 0 nothing may change, not even state
    else:
        base_lr = tl.full((), 0.0, tl.float64) + lr
        active = tl.full((), 1.0, tl.float32)
    size = tl.load(integers + tensor * INTEGERS + SIZE)
    q = tl.arange(0, ROW)
    stats = pointer(addresses, tensor, STATS, tl.float32)
    z = tl.load(stats + q, mask=q < 14, other=0.0).to(tl.float64)
    t = tl.load(pointer(addresses, tensor, STEP, tl.float32)).to(tl.float64)
    total = tl.full((), 0.0, tl.float64) + total_steps
    rate = _schedule(t, total)
    shrinking = tl.exp(tl.log(rate) * DECAY_POWER + pick(z, 13))
    decay = 1.0 - base_lr * weight_decay * shrinking
    first = pick(z, 0)
    rms = pick(z, 1)
    if t == 0:  # both are measured, before the step
        first = _first_rms(
            pointer(addresses, tensor, PARAM, PARAM_TYPE),
            pointer(addresses, tensor, GRAD, PARAM_TYPE),
            size,
            decay,
            PARAM_TYPE,
            BLOCK,
        )
        rms = first
    natural = tl.load(constants + tensor * CONSTANTS + INIT_SCALE)
    log_fan_in = tl.load(constants + tensor * CONSTANTS + LOG_FAN_IN)
    is_vector = tl.load(constants + tensor * CONSTANTS + IS_VECTOR)
    rotated = tl.where(tl.load(addresses + tensor * ADDRESSES + UPDATE) != 0, 1.0, 0.0)
    x = _inputs(z, t, rms, first, natural, log_fan_in, is_vector, size, total, rotated, WIDTH)
    own = tensor * OWN_NETWORKS  # 0 where all tensors share a network
    out = _respond(
        x, hidden + own * UNITS * INPUTS, hidden_bias + own * UNITS, readout + own * 5 * UNITS,
        readout_bias + own * 5, direct + own * 5 * INPUTS, UNITS, WIDTH,
    )  # fmt: skip
    scale = tl.maximum(tl.minimum(rms, LARGEST_SCALE), natural * SMALLEST_SHARE)
    ramp = tl.where(warmup > 0, tl.minimum((t + 1) / tl.maximum(warmup, 1.0), 1.0), 1.0)
    length = base_lr * ramp * BASE_STEP * rate * scale
    length *= tl.exp(tanh(pick(out, 0) / STEP_BOUND) * STEP_BOUND + pick(z, 13))
    before = tl.where(t > 0, 1.0, 0.0)
    age = tl.maximum(t, 1.0)
    row = tl.where(q == 0, -length * (1.0 + tanh(pick(out, 1) / MIX_BOUND) * MIX_BOUND), 0.0)
    for k in tl.static_range(1, 4):
        gain = -length * tanh(pick(out, k + 1) / MIX_BOUND) * MIX_BOUND
        row = tl.where(q == k, gain, row)
    row = tl.where(q == 4, 1.0 / correction(LOG_FAST, t + 1), row)
    row = tl.where(q == 5, 1.0 / correction(LOG_SLOW, t + 1), row)
    row = tl.where(q == 6, 1.0 / correction(LOG_SQUARE, t + 1), row)
    row = tl.where(q == 7, before / correction(LOG_FAST, age), row)
    row = tl.where(q == 8, before / correction(LOG_SLOW, age), row)
    row = tl.where(q == 9, decay, row)
    row = tl.where(q == 10, active, row)
    tl.store(gains + tensor * ROW + q, row)
