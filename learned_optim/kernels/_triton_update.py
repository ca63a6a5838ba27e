# mypy: ignore-errors
# ruff: noqa: RET505, SIM300 (Triton reads the branches of a constant condition its own way)
"""The second launch of a step on a GPU: moments, parameters and statistics, chunk by chunk."""

import triton
import triton.language as tl

from learned_optim.kernels import constants as c
from learned_optim.kernels._triton_common import (
    ADDRESSES,
    CHUNKS,
    FAST,
    FIRST_CHUNK,
    GRAD,
    INTEGERS,
    LOG_LONG,
    PARAM,
    ROW,
    SIZE,
    SLOW,
    SQUARE,
    STATS,
    STEP,
    TINY2,
    UPDATE,
    clamp,
    correction,
    decayed,
    pick,
    pointer,
    sanitized,
)

FAST_RATE: tl.constexpr = tl.constexpr(1.0 - c.FAST_BETA)
SLOW_RATE: tl.constexpr = tl.constexpr(1.0 - c.SLOW_BETA)
SQUARE_RATE: tl.constexpr = tl.constexpr(1.0 - c.SQUARE_BETA)
LARGEST_RATIO: tl.constexpr = tl.constexpr(c.LARGEST_RATIO)
SHORT: tl.constexpr = tl.constexpr(c.SHORT_BETA)
LONG: tl.constexpr = tl.constexpr(c.LONG_BETA)
WARMUP_STEPS: tl.constexpr = tl.constexpr(c.WARMUP_STEPS)
CONFIDENCE_START: tl.constexpr = tl.constexpr(c.CONFIDENCE_START)
CONFIDENCE_GAIN: tl.constexpr = tl.constexpr(c.CONFIDENCE_GAIN)
UNKNOWN_GAIN: tl.constexpr = tl.constexpr(c.UNKNOWN_GAIN)
KNOWN_GAIN: tl.constexpr = tl.constexpr(c.KNOWN_GAIN)
GROWTH_LOSS: tl.constexpr = tl.constexpr(c.GROWTH_LOSS)
LEAST_GROWTH: tl.constexpr = tl.constexpr(c.LEAST_GROWTH)
LEAST_OPPOSITION: tl.constexpr = tl.constexpr(c.LEAST_OPPOSITION)


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
        # Past the first cache, which knows nothing of what other processors have written.
        part = tl.load(partials + at, mask=mask, other=0.0, cache_modifier=".cg")
        sums += tl.sum(part.to(tl.float64), axis=0)
    mean = sums / tl.maximum(size, 1).to(tl.float64)
    z = tl.load(stats + q, mask=q < 14, other=0.0).to(tl.float64)
    t = tl.load(step)
    rms = tl.sqrt(pick(mean, 0))
    square = pick(mean, 1)
    level = tl.log(square + TINY2)
    ratio2 = pick(mean, 7)
    with_fast = pick(mean, 8) / tl.sqrt(ratio2 * pick(mean, 10) + 1e-20)
    with_slow = pick(mean, 9) / tl.sqrt(ratio2 * pick(mean, 11) + 1e-20)
    r = pick(mean, 4)
    new = tl.where(q == 2, level, z)
    new = tl.where(q == 3, tl.where(t > 0, _average(z, LONG, level), level), new)
    new = tl.where(q == 4, _ratio(pick(mean, 2), square), new)
    new = tl.where(q == 5, _ratio(pick(mean, 3), square), new)
    new = tl.where(q == 6, tl.log(pick(mean, 5) + 1e-4), new)
    new = tl.where(q == 7, tl.log(pick(mean, 6) + 1e-4), new)
    new = tl.where(q == 8, _ratio(r * r, square), new)
    new = tl.where(q == 9, _average(z, SHORT, with_fast), new)
    new = tl.where(q == 10, _average(z, LONG, with_fast), new)
    new = tl.where(q == 11, _average(z, SHORT, with_slow), new)
    new = tl.where(q == 12, _average(z, SHORT, pick(mean, 12)), new)
    agreement = clamp(with_fast / tl.sqrt(tl.maximum(pick(mean, 12), 1e-3)), -1.0, 1.0)
    growth = tl.where(t > 0, level.to(tl.float32) - pick(z, 3), 0.0)
    mean = pick(new, 10) / correction(LOG_LONG, t.to(tl.float64) + 1.0)
    new = tl.where(q == 13, _next_confidence(z, agreement, mean, growth, t, KNOWN), new)
    new = tl.where(square > 0, new, z)  # nothing to tell where there never was a gradient
    new = tl.where(q == 1, rms, new)
    new = tl.where(q == 0, tl.where(t > 0, z, rms), new)
    tl.store(stats + q, new.to(tl.float32), mask=q < 14)
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
    """Moments, parameters and sums of one chunk; ``WHOLE``: it does not reach beyond the end."""
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
    """One chunk of one tensor; the tensor's last one to finish writes its statistics."""
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
        # All threads have stored their sums before one of them counts this chunk, and who counts
        # last sees what the others have stored: release and acquire, for the whole device.
        tl.debug_barrier()
        done = tl.atomic_add(counters + tensor, 1, sem="acq_rel", scope="gpu")
        if done == count - 1:
            _finish(
                pointer(addresses, tensor, STATS, tl.float32),
                pointer(addresses, tensor, STEP, tl.float32),
                partials, first, count, size, KNOWN,
            )  # fmt: skip
