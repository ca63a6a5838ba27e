# mypy: ignore-errors

"""The first launch of a step on a GPU: from statistics to the gains of each tensor."""

import triton
import triton.language as tl

from learned_optim.kernels._triton_common import (
    CONSTANTS,
    GRAD,
    INIT_SCALE,
    INTEGERS,
    IS_VECTOR,
    LOG_FAN_IN,
    LOG_LONG,
    LR_SCALE,
    PARAM,
    ROW,
    SIZE,
    STATS,
    STEP,
    clamp,
    correction,
    decayed,
    pick,
    pointer,
    sanitized,
    tanh,
)

LARGEST_COUNT: tl.constexpr = tl.constexpr(10000.0)
LOG_SHORT: tl.constexpr = tl.constexpr(-0.10536051565782628)
STEP_BOUND: tl.constexpr = tl.constexpr(3.0)
MIX_BOUND: tl.constexpr = tl.constexpr(2.0)
LAST_RATE: tl.constexpr = tl.constexpr(0.01)
SHORTEST_WARMUP: tl.constexpr = tl.constexpr(10.0)
LONGEST_WARMUP: tl.constexpr = tl.constexpr(250.0)
PI: tl.constexpr = tl.constexpr(3.141592653589793)


@triton.jit
def _first_rms(
    param, grad, size, decay, idle_decay, PARAM_TYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Root mean square of a whole tensor, by one program: once in a run."""
    total = tl.full((), 0.0, tl.float64)
    for at in range(0, size, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        values = tl.load(param + offsets, mask=offsets < size, other=0.0)
        g = sanitized(tl.load(grad + offsets, mask=offsets < size, other=0.0), 1.0, PARAM_TYPE)
        q = decayed(values, tl.where(g != 0.0, decay, idle_decay), PARAM_TYPE).to(tl.float32)
        total += tl.sum(q * q, axis=0).to(tl.float64)
    return tl.sqrt(total / tl.maximum(size, 1).to(tl.float64))


@triton.jit
def _inputs(z, t, rms, first, natural, log_fan_in, is_vector, size, total, WIDTH: tl.constexpr):
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
    return tl.where(i == 21, pick(z, 13) / 4, x)


@triton.jit
def _respond(
    x, hidden, hidden_bias, readout, readout_bias, direct,
    UNITS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
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
def _schedule(t, total, warmup_share, warmup_steps):
    """Linear warm-up; with a known length of the run, a cosine to its end as well."""
    warmup = tl.where(
        total > 0, clamp(warmup_share * total, SHORTEST_WARMUP, LONGEST_WARMUP), warmup_steps
    )
    fall = 0.5 * (1.0 + tl.cos(tl.minimum((t + 1) / (total + 1), 1.0) * PI))
    fall = tl.where(total > 0, tl.maximum(fall, LAST_RATE), 1.0)
    return tl.minimum((t + 1) / warmup, 1.0) * fall


@triton.jit
def gains_kernel(
    addresses, integers, constants, hidden, hidden_bias, readout, readout_bias, direct, lr_pointer,
    gains, counters, lr, weight_decay, total_steps, warmup, log_fast, log_slow, log_square,
    base_step, largest_scale, smallest_share, warmup_share, warmup_steps, decay_power,
    decay_live, adapter_power,
    PARAM_TYPE: tl.constexpr, UNITS: tl.constexpr, INPUTS: tl.constexpr, OWN_NETWORKS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gains of one tensor, and what else the update needs to know of it.

    A row is: gains of fast, slow, gradient and cautious direction; factors on the three moments
    after this step and on both momenta before it; the factor of weight decay; whether to step; that
    factor where the gradient is zero.
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
    own_lr = base_lr * tl.load(constants + tensor * CONSTANTS + LR_SCALE)
    size = tl.load(integers + tensor * INTEGERS + SIZE)
    q = tl.arange(0, ROW)
    stats = pointer(addresses, tensor, STATS, tl.float32)
    z = tl.load(stats + q, mask=q < 14, other=0.0).to(tl.float64)
    t = tl.load(pointer(addresses, tensor, STEP, tl.float32)).to(tl.float64)
    total = tl.full((), 0.0, tl.float64) + total_steps
    rate = _schedule(t, total, warmup_share, warmup_steps)
    shrinking = tl.exp(decay_power * tl.log(rate) + pick(z, 13))
    decay = 1.0 - own_lr * weight_decay * shrinking
    idle_decay = tl.where(decay_live > 0, 1.0, decay)
    first = pick(z, 0)
    rms = pick(z, 1)
    if t == 0:  # both are measured, before the step
        first = _first_rms(
            pointer(addresses, tensor, PARAM, PARAM_TYPE),
            pointer(addresses, tensor, GRAD, PARAM_TYPE),
            size,
            decay,
            idle_decay,
            PARAM_TYPE,
            BLOCK,
        )
        rms = first
    natural = tl.minimum(tl.load(constants + tensor * CONSTANTS + INIT_SCALE), largest_scale)
    log_fan_in = tl.load(constants + tensor * CONSTANTS + LOG_FAN_IN)
    is_vector = tl.load(constants + tensor * CONSTANTS + IS_VECTOR)
    x = _inputs(z, t, rms, first, natural, log_fan_in, is_vector, size, total, WIDTH)
    own = tensor * OWN_NETWORKS  # 0 where all tensors share a network
    out = _respond(
        x, hidden + own * UNITS * INPUTS, hidden_bias + own * UNITS, readout + own * 5 * UNITS,
        readout_bias + own * 5, direct + own * 5 * INPUTS, UNITS, INPUTS, WIDTH,
    )  # fmt: skip
    scale = tl.maximum(tl.minimum(rms, largest_scale), smallest_share * natural)
    tall = tl.log(tl.maximum(size, 1).to(tl.float64)) - 2 * log_fan_in
    tall = tl.where(is_vector > 0, 0.0, tl.maximum(tall, 0.0))
    live = tl.where(t > 0, pick(z, 12) / correction(LOG_SHORT, tl.maximum(t, 1.0)), 1.0)
    scale *= tl.where(first == 0, tl.exp(-adapter_power * live * tall), 1.0)
    ramp = tl.where(warmup > 0, tl.minimum((t + 1) / tl.maximum(warmup, 1.0), 1.0), 1.0)
    length = own_lr * ramp * base_step * rate * scale
    length *= tl.exp(tanh(pick(out, 0) / STEP_BOUND) * STEP_BOUND + pick(z, 13))
    before = tl.where(t > 0, 1.0, 0.0)
    age = tl.maximum(t, 1.0)
    row = tl.where(q == 0, -length * (1.0 + tanh(pick(out, 1) / MIX_BOUND) * MIX_BOUND), 0.0)
    for k in tl.static_range(1, 4):
        gain = -length * tanh(pick(out, k + 1) / MIX_BOUND) * MIX_BOUND
        row = tl.where(q == k, gain, row)
    row = tl.where(q == 4, 1.0 / correction(log_fast, t + 1), row)
    row = tl.where(q == 5, 1.0 / correction(log_slow, t + 1), row)
    row = tl.where(q == 6, 1.0 / correction(log_square, t + 1), row)
    row = tl.where(q == 7, before / correction(log_fast, age), row)
    row = tl.where(q == 8, before / correction(log_slow, age), row)
    row = tl.where(q == 9, decay, row)
    row = tl.where(q == 11, idle_decay, row)
    row = tl.where(q == 10, active, row)
    tl.store(gains + tensor * ROW + q, row)
