# mypy: ignore-errors
# ruff: noqa: F821, RET505, SIM300 (constants; Triton reads branches of a constant condition)
"""The step of the rule ``horizon`` in Triton: the computation of ``step.cpp`` on a GPU.

Two launches. :func:`gains_kernel`, one program per tensor: inputs from the statistics of the step
before, the network, gains. :func:`update_kernel`, one program per chunk of a tensor: moments,
parameters and sums. The chunk of a tensor that finishes last adds up the sums of all its chunks and
writes the statistics. It adds in a fixed order, so results do not depend on which chunk is last.

Numbers per tensor are float64, per coordinate float32, as in ``step.cpp``.
"""

import math

import triton
import triton.language as tl

from learned_optim.kernels import constants as c

# Kernels read global names that are constexpr. Those of constants.py keep their names.
globals().update({name: tl.constexpr(x) for name, x in vars(c).items() if name.isupper()})
TINY2 = tl.constexpr(c.TINY**2)
FAST_RATE, SLOW_RATE, SQUARE_RATE, LOG_FAST, LOG_SLOW, LOG_SQUARE, LOG_SHORT, LOG_LONG = (
    tl.constexpr(value)
    for value in (
        *(1.0 - beta for beta in (c.FAST_BETA, c.SLOW_BETA, c.SQUARE_BETA)),
        *map(math.log, (c.FAST_BETA, c.SLOW_BETA, c.SQUARE_BETA, c.SHORT_BETA, c.LONG_BETA)),
    )
)
INFINITY, PI = tl.constexpr(math.inf), tl.constexpr(math.pi)

# Columns of the addresses, of the layout's integers and of its constants.
PARAM, GRAD, FAST, SLOW, SQUARE, STATS, STEP, UPDATE, ADDRESSES = map(tl.constexpr, range(9))
SIZE, FIRST_CHUNK, CHUNKS, INTEGERS = map(tl.constexpr, range(4))
INIT_SCALE, LOG_FAN_IN, IS_VECTOR, CONSTANTS = map(tl.constexpr, range(4))
ROW = tl.constexpr(16)  # of gains or of sums, the last entries unused


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


# ---- functions of single values


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
    """The parameter after weight decay, which spares coordinates without a gradient.

    It is float64 or float32, so decay and update together round once.
    """
    WIDE: tl.constexpr = tl.float64 if PARAM_TYPE == tl.float64 else tl.float32
    return param.to(WIDE) * tl.where(grad != 0.0, decay, 1.0).to(WIDE)


# ---- the first launch: from statistics to the gains of each tensor


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
    used = (o[:, None] < 5) & (i[None, :] < NUM_INPUTS)
    direct_weight = tl.load(direct + o[:, None] * NUM_INPUTS + i[None, :], mask=used, other=0.0)
    out = tl.sum(direct_weight.to(tl.float64) * x[None, :], axis=1)
    out += tl.load(readout_bias + o, mask=o < 5, other=0.0).to(tl.float64)
    for begin in range(0, UNITS, BLOCK):
        u = begin + tl.arange(0, BLOCK)
        into = (u[:, None] < UNITS) & (i[None, :] < NUM_INPUTS)
        out_of = (o[:, None] < 5) & (u[None, :] < UNITS)
        weight = tl.load(hidden + u[:, None] * NUM_INPUTS + i[None, :], mask=into, other=0.0)
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
    z = tl.load(stats + q, mask=q < NUM_STATS, other=0.0).to(tl.float64)
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
        x, hidden + own * UNITS * NUM_INPUTS, hidden_bias + own * UNITS, readout + own * 5 * UNITS,
        readout_bias + own * 5, direct + own * 5 * NUM_INPUTS, UNITS, WIDTH,
    )  # fmt: skip
    fast = 1.0 + tanh(pick(out, 1) / MIX_BOUND) * MIX_BOUND
    slow = tanh(pick(out, 2) / MIX_BOUND) * MIX_BOUND
    grad = tanh(pick(out, 3) / MIX_BOUND) * MIX_BOUND
    cautious = tanh(pick(out, 4) / MIX_BOUND) * MIX_BOUND
    # Root mean square of the directions' sum, at most, by the statistics of the step before.
    length = tl.abs(fast + cautious) * tl.exp(0.5 * pick(z, 6))
    length += tl.abs(slow) * tl.exp(0.5 * pick(z, 7)) + tl.abs(grad)
    least = natural * SMALLEST_SHARE
    step = rate * BASE_STEP * tl.maximum(tl.minimum(rms, LARGEST_SCALE), least)
    step *= tl.exp(tanh(pick(out, 0) / STEP_BOUND) * STEP_BOUND + pick(z, 13))
    step = tl.minimum(step, tl.maximum(rms, least) * LONGEST_STEP / length)
    ramp = tl.where(warmup > 0, tl.minimum((t + 1) / tl.maximum(warmup, 1.0), 1.0), 1.0)
    step *= -base_lr * ramp * tl.where(size == 1, SINGLE_SHARE, 1.0)
    before = tl.where(t > 0, 1.0, 0.0)
    age = tl.maximum(t, 1.0)
    row = tl.where(q == 0, step * fast, 0.0)
    row = tl.where(q == 1, step * slow, row)
    row = tl.where(q == 2, step * grad, row)
    row = tl.where(q == 3, step * cautious, row)
    row = tl.where(q == 4, 1.0 / correction(LOG_FAST, t + 1), row)
    row = tl.where(q == 5, 1.0 / correction(LOG_SLOW, t + 1), row)
    row = tl.where(q == 6, 1.0 / correction(LOG_SQUARE, t + 1), row)
    row = tl.where(q == 7, before / correction(LOG_FAST, age), row)
    row = tl.where(q == 8, before / correction(LOG_SLOW, age), row)
    row = tl.where(q == 9, decay, row)
    row = tl.where(q == 10, active, row)
    tl.store(gains + tensor * ROW + q, row)


# ---- the second launch: moments, parameters and statistics, chunk by chunk


@triton.jit
def _ratio(x, reference):
    return tl.log(clamp(x / (reference + TINY2), 1e-7, 1e7))


@triton.jit
def _average(old, beta, new):
    return new + (old - new) * beta


@triton.jit
def _next_confidence(log, agreement, mean, growth, t, KNOWN: tl.constexpr):
    """See step.cpp."""
    floor = tl.maximum(-0.5 * tl.log(1.0 + t / WARMUP_STEPS), CONFIDENCE_START)
    saturated = log >= tl.where(t >= WARMUP_STEPS, floor, 1.0)  # logs are at most 0
    if KNOWN:
        grown = tl.maximum(growth - LEAST_GROWTH, 0.0) * GROWTH_LOSS
        lost = tl.where(mean < -LEAST_OPPOSITION, grown, 0.0)
        moved = tl.where(agreement > 0, agreement * KNOWN_GAIN, -lost)
    else:
        moved = agreement * UNKNOWN_GAIN
    earned = tl.where(log < 0, agreement * CONFIDENCE_GAIN, 0.0)
    low = tl.where(saturated, floor, CONFIDENCE_START)
    return clamp(log + tl.where(saturated, moved, earned), low, 0.0)


@triton.jit
def _finish(stats, step, partials, first, count, size, KNOWN: tl.constexpr):
    """Statistics of the step from the sums of all chunks, and the number of steps."""
    ROWS: tl.constexpr = 32
    q = tl.arange(0, ROW)
    sums = tl.zeros((ROW,), tl.float64)
    for begin in range(0, count, ROWS):
        chunk = begin + tl.arange(0, ROWS)
        at = (first + chunk)[:, None] * ROW + q[None, :]
        mask = (chunk[:, None] < count) & (q[None, :] < 13)
        # Past the first cache, which does not see what other processors have written.
        part = tl.load(partials + at, mask=mask, other=0.0, cache_modifier=".cg")
        sums += tl.sum(part.to(tl.float64), axis=0)
    mean = sums / tl.maximum(size, 1).to(tl.float64)
    z = tl.load(stats + q, mask=q < NUM_STATS, other=0.0).to(tl.float64)
    t = tl.load(step)
    rms = tl.sqrt(pick(mean, 0))
    square = pick(mean, 1)
    level = tl.log(square + TINY2)
    ratio2 = pick(mean, 7)
    with_fast = pick(mean, 8) / tl.sqrt(ratio2 * pick(mean, 10) + 1e-20)
    with_slow = pick(mean, 9) / tl.sqrt(ratio2 * pick(mean, 11) + 1e-20)
    r = pick(mean, 4)
    new = tl.where(q == 2, level, z)
    new = tl.where(q == 3, tl.where(t > 0, _average(z, LONG_BETA, level), level), new)
    new = tl.where(q == 4, _ratio(pick(mean, 2), square), new)
    new = tl.where(q == 5, _ratio(pick(mean, 3), square), new)
    new = tl.where(q == 6, tl.log(pick(mean, 5) + 1e-4), new)
    new = tl.where(q == 7, tl.log(pick(mean, 6) + 1e-4), new)
    new = tl.where(q == 8, _ratio(r * r, square), new)
    new = tl.where(q == 9, _average(z, SHORT_BETA, with_fast), new)
    new = tl.where(q == 10, _average(z, LONG_BETA, with_fast), new)
    new = tl.where(q == 11, _average(z, SHORT_BETA, with_slow), new)
    new = tl.where(q == 12, _average(z, SHORT_BETA, pick(mean, 12)), new)
    agreement = clamp(with_fast / tl.sqrt(tl.maximum(pick(mean, 12), 1e-3)), -1.0, 1.0)
    growth = tl.where(t > 0, level.to(tl.float32) - pick(z, 3), 0.0)
    mean = pick(new, 10) / correction(LOG_LONG, t.to(tl.float64) + 1.0)
    new = tl.where(q == 13, _next_confidence(z, agreement, mean, growth, t, KNOWN), new)
    new = tl.where(square > 0, new, z)  # statistics of gradients begin with the first gradient
    new = tl.where(q == 1, rms, new)
    new = tl.where(q == 0, tl.where(t > 0, z, rms), new)
    tl.store(stats + q, new.to(tl.float32), mask=q < NUM_STATS)
    tl.store(step, t + 1.0)


@triton.jit
def _pointers(pointer, at, ALIGNED: tl.constexpr):
    if ALIGNED:  # several coordinates per load
        return tl.max_contiguous(tl.multiple_of(pointer + at, 16), 16)
    else:
        return pointer + at


@triton.jit
def _load(pointer, at, size, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    if WHOLE:
        return tl.load(_pointers(pointer, at, ALIGNED))
    else:
        return tl.load(pointer + at, mask=at < size, other=0.0)


@triton.jit
def _store(pointer, at, size, value, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    if WHOLE:
        tl.store(_pointers(pointer, at, ALIGNED), value)
    else:
        tl.store(pointer + at, value, mask=at < size)


@triton.jit
def _update_chunk(
    addresses, tensor, begin, size, row, sums, sign,
    PARAM_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Moments, parameters and sums of one chunk; ``WHOLE``: it ends within the tensor."""
    WIDE: tl.constexpr = tl.float64 if PARAM_TYPE == tl.float64 else tl.float32
    param_at = pointer(addresses, tensor, PARAM, PARAM_TYPE)
    grad_at = pointer(addresses, tensor, GRAD, PARAM_TYPE)
    fast_at = pointer(addresses, tensor, FAST, STATE_TYPE)
    slow_at = pointer(addresses, tensor, SLOW, STATE_TYPE)
    square_at = pointer(addresses, tensor, SQUARE, STATE_TYPE)
    k_fast = tl.load(row + 0).to(tl.float32)
    k_slow = tl.load(row + 1).to(tl.float32)
    k_grad = tl.load(row + 2).to(tl.float32)
    k_cautious = tl.load(row + 3).to(tl.float32)
    fast_correction = tl.load(row + 4).to(tl.float32)
    slow_correction = tl.load(row + 5).to(tl.float32)
    square_correction = tl.load(row + 6).to(tl.float32)
    fast_before = tl.load(row + 7).to(tl.float32)
    slow_before = tl.load(row + 8).to(tl.float32)
    decay = tl.load(row + 9)
    # 0 where the update goes onto the parameter.
    update_address = tl.load(addresses + tensor * ADDRESSES + UPDATE)
    apart = update_address != 0
    update_at = update_address.to(tl.pointer_type(tl.float32))
    param2 = tl.zeros((BLOCK,), tl.float32)
    square1, fast2, slow2, r1 = param2, param2, param2, param2
    ratio_fast2, ratio_slow2, ratio2 = param2, param2, param2
    ratio_old_fast, ratio_old_slow, old_fast2, old_slow2 = param2, param2, param2, param2
    live = param2
    for start in range(0, CHUNK, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        g = sanitized(_load(grad_at, at, size, WHOLE, ALIGNED), sign, PARAM_TYPE)
        fast_old = _load(fast_at, at, size, WHOLE, ALIGNED).to(tl.float32)
        slow_old = _load(slow_at, at, size, WHOLE, ALIGNED).to(tl.float32)
        square_old = _load(square_at, at, size, WHOLE, ALIGNED).to(tl.float32)
        fast = fast_old + (g - fast_old) * FAST_RATE
        slow = slow_old + (g - slow_old) * SLOW_RATE
        square = square_old + (g * g - square_old) * SQUARE_RATE
        _store(fast_at, at, size, fast.to(STATE_TYPE), WHOLE, ALIGNED)
        _store(slow_at, at, size, slow.to(STATE_TYPE), WHOLE, ALIGNED)
        _store(square_at, at, size, square.to(STATE_TYPE), WHOLE, ALIGNED)
        v = square * square_correction
        r = tl.sqrt(v + TINY2)
        inverse = 1.0 / r
        f = fast * fast_correction
        s = slow * slow_correction
        rf = f * inverse
        rs = s * inverse
        rg = clamp(g * inverse, -LARGEST_RATIO, LARGEST_RATIO)
        old_f = fast_old * fast_before * inverse
        old_s = slow_old * slow_before * inverse
        cautious = tl.where(rf * g > 0.0, rf, 0.0)
        update = k_fast * rf + k_slow * rs + k_grad * rg + k_cautious * cautious
        before = decayed(_load(param_at, at, size, WHOLE, ALIGNED), g, decay, PARAM_TYPE)
        if apart:
            _store(param_at, at, size, before.to(PARAM_TYPE), WHOLE, ALIGNED)
            _store(update_at, at, size, update, WHOLE, ALIGNED)
        else:
            _store(param_at, at, size, (before + update.to(WIDE)).to(PARAM_TYPE), WHOLE, ALIGNED)
        p = before.to(tl.float32)
        param2 += p * p
        square1 += v
        fast2 += f * f
        slow2 += s * s
        r1 += r if WHOLE else tl.where(at < size, r, 0.0)  # alone not 0 beyond the end
        ratio_fast2 += rf * rf
        ratio_slow2 += rs * rs
        ratio2 += rg * rg
        ratio_old_fast += rg * old_f
        ratio_old_slow += rg * old_s
        old_fast2 += old_f * old_f
        old_slow2 += old_s * old_s
        live += tl.where(g != 0.0, 1.0, 0.0)
    tl.store(sums + 0, tl.sum(param2, axis=0))
    tl.store(sums + 1, tl.sum(square1, axis=0))
    tl.store(sums + 2, tl.sum(fast2, axis=0))
    tl.store(sums + 3, tl.sum(slow2, axis=0))
    tl.store(sums + 4, tl.sum(r1, axis=0))
    tl.store(sums + 5, tl.sum(ratio_fast2, axis=0))
    tl.store(sums + 6, tl.sum(ratio_slow2, axis=0))
    tl.store(sums + 7, tl.sum(ratio2, axis=0))
    tl.store(sums + 8, tl.sum(ratio_old_fast, axis=0))
    tl.store(sums + 9, tl.sum(ratio_old_slow, axis=0))
    tl.store(sums + 10, tl.sum(old_fast2, axis=0))
    tl.store(sums + 11, tl.sum(old_slow2, axis=0))
    tl.store(sums + 12, tl.sum(live, axis=0))


@triton.jit
def update_kernel(
    addresses, integers, chunk_tensor, gains, counters, partials, sign, KNOWN: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor; the chunk that finishes last writes the tensor's statistics."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    size = tl.load(integers + tensor * INTEGERS + SIZE)
    first = tl.load(integers + tensor * INTEGERS + FIRST_CHUNK)
    count = tl.load(integers + tensor * INTEGERS + CHUNKS)
    row = gains + tensor * ROW
    if tl.load(row + 10) != 0:
        begin = (chunk - first) * CHUNK
        sums = partials + chunk * ROW
        if begin + CHUNK <= size:
            _update_chunk(
                addresses, tensor, begin, size, row, sums, sign,
                PARAM_TYPE, STATE_TYPE, CHUNK, BLOCK, True, ALIGNED,
            )  # fmt: skip
        else:
            _update_chunk(
                addresses, tensor, begin, size, row, sums, sign,
                PARAM_TYPE, STATE_TYPE, CHUNK, BLOCK, False, ALIGNED,
            )  # fmt: skip
        # All threads store their sums before one of them counts this chunk. The count releases
        # and acquires on the whole device, so the last program sees the sums of all others.
        tl.debug_barrier()
        done = tl.atomic_add(counters + tensor, 1, sem="acq_rel", scope="gpu")
        if done == count - 1:
            _finish(
                pointer(addresses, tensor, STATS, tl.float32),
                pointer(addresses, tensor, STEP, tl.float32),
                partials, first, count, size, KNOWN,
            )  # fmt: skip
