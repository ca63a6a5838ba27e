"""Statistics of each tensor that the horizon rule keeps, and the network's inputs.

A step is described by ``(m, f)`` numbers: its time, then its measurements. The network reads the
time of the step, and from ``stats`` the measurements of the step before. So one pass over the
coordinates is enough.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learned_optim.kernels import constants as c
from learned_optim.rules._features import bias_correction

# Columns of an observed step: its number and schedule, the scale that the tensor's shape suggests,
# inputs of the network, and measurements.
STEP, SCHEDULE, NATURAL = range(3)
SIZE = 4  # log of the number of coordinates / 6 - 1; one of the inputs
KNOWN = 8  # whether the length of the run is known; one of the inputs
TIME_INPUTS, ROTATED, MEASUREMENTS = slice(3, 12), 12, slice(13, None)

# Entries of ``stats``, all of the step before. Logs are natural.
(
    FIRST_RMS,  # root mean square of the parameters at the first step
    RMS,  # root mean square of the parameters
    LEVEL,  # log of the mean square of the gradient
    MEAN_LEVEL,  # moving average of LEVEL
    FAST_SHARE,  # log of the mean square of the fast momentum over that of the gradient
    SLOW_SHARE,  # the same of the slow momentum
    FAST_SIGNAL,  # log of the mean square of the fast momentum in units of each coordinate's r
    SLOW_SIGNAL,  # the same of the slow momentum
    INEQUALITY,  # log of the squared mean of r over the mean of its square
    FAST_CORRELATION,  # of the gradient with the fast momentum before it, averaged over 10 steps
    MEAN_CORRELATION,  # the same, averaged over 100 steps
    SLOW_CORRELATION,  # of the gradient with the slow momentum before it, averaged over 10 steps
    LIVE,  # share of coordinates whose gradient is not zero, averaged over 10 steps
    CONFIDENCE,  # log of the step confidence
) = range(c.NUM_STATS)


def next_confidence(
    log: Tensor,
    agreement: Tensor,
    mean_agreement: Tensor,
    growth: Tensor,
    step: Tensor,
    known: Tensor,
) -> Tensor:
    """The log of the step confidence after a step, ``(m,)``.

    It grows with the agreement of gradient and momentum until it has reached 0. From then on, after
    the warm-up, it moves less: with the agreement in runs of unknown length; in runs of known
    length, which a schedule anneals, it falls only where gradients grow while they oppose the
    momentum. It stays above the rate of a run without end, ``-log(1 + step / warmup) / 2``. A value
    below that floor has not reached 0 yet.

    Args:
        log: before the step.
        agreement: correlation of the gradient with the momentum before it.
        mean_agreement: its average over a hundred steps.
        growth: log of the gradient's mean square, less its moving average.
        step: number of earlier updates.
        known: 1 where the length of the run is known, else 0.
    """
    floor = (-0.5 * (1 + step / c.WARMUP_STEPS).log()).clamp(min=c.CONFIDENCE_START)
    saturated = (step >= c.WARMUP_STEPS) & (log >= floor)
    opposed = mean_agreement < -c.LEAST_OPPOSITION
    lost = torch.where(opposed, c.GROWTH_LOSS * (growth - c.LEAST_GROWTH).clamp(min=0.0), 0.0)
    moved = torch.where(
        known > 0,
        torch.where(agreement > 0, c.KNOWN_GAIN * agreement, -lost),
        c.UNKNOWN_GAIN * agreement,
    )
    earned = torch.where(log < 0, c.CONFIDENCE_GAIN * agreement, 0.0)
    low = torch.where(saturated, floor, c.CONFIDENCE_START)
    return torch.maximum(log + torch.where(saturated, moved, earned), low).clamp(max=0.0)


def measurements(means: Tensor) -> tuple[Tensor, ...]:
    """Measurements of one step of each tensor, 11 of shape ``(m,)``.

    Args:
        means: over each tensor, ``(13, m)``: squares of the parameter, mean square, squares of both
            momenta, of both in units of r, mean r, products of the gradient in units of r with both
            momenta before it, squares of these three, and the share of gradients that are not zero.
    """
    (
        param, square, fast, slow, s_fast, s_slow, r, with_fast, with_slow, ratio, old_fast,
        old_slow, live,
    ) = means  # fmt: skip
    return (
        param.sqrt(),
        (square + c.TINY**2).log(),
        _log_ratio(fast, square),
        _log_ratio(slow, square),
        (s_fast + 1e-4).log(),
        (s_slow + 1e-4).log(),
        _log_ratio(r.square(), square),
        with_fast / (ratio * old_fast + 1e-20).sqrt(),
        with_slow / (ratio * old_slow + 1e-20).sqrt(),
        live,
        (square > 0).to(square.dtype),
    )


def scale_of(seen: Tensor, stats: Tensor, entry: int = RMS) -> Tensor:
    """Root mean square of each tensor's parameters before the step, ``(m,)``.

    It is an entry of ``stats``, or at the first step a measurement of this step.
    """
    return torch.where(seen[:, STEP] > 0, stats[:, entry], seen[:, MEASUREMENTS][:, 0])


def network_inputs(seen: Tensor, stats: Tensor) -> Tensor:
    """The network's inputs, ``(m, 23)``.

    ``seen`` is the step, ``(m, f)``; ``stats`` are those before it, ``(m, 14)``.
    """
    step, natural = seen[:, STEP], seen[:, NATURAL]
    rms, first = scale_of(seen, stats), scale_of(seen, stats, FIRST_RMS)
    started = (step > 0).to(stats.dtype)
    short, long = (
        started / bias_correction(step.clamp(min=1), beta)[0]
        for beta in (c.SHORT_BETA, c.LONG_BETA)
    )
    of = stats.unbind(-1)
    live = (of[LIVE] * short + 1e-3).log() / 4
    moved = torch.log(rms.clamp(min=1e-8) / torch.maximum(first, 0.01 * natural)) / 2
    inputs = (
        (rms / natural).clamp(min=math.exp(-8.0)).log() / 4,
        *seen[:, TIME_INPUTS].unbind(-1),
        *(started * of[entry] / 4 for entry in range(FAST_SHARE, INEQUALITY + 1)),
        of[FAST_CORRELATION] * short,
        of[MEAN_CORRELATION] * long,
        of[SLOW_CORRELATION] * short,
        started * live,
        moved,
        started * (of[LEVEL] - of[MEAN_LEVEL]) / 4,
        of[CONFIDENCE] / 4,
        seen[:, ROTATED],
    )
    return torch.stack(inputs, dim=-1)


def next_stats(seen: Tensor, stats: Tensor) -> Tensor:
    """``stats`` after the step, ``(m, 14)``.

    Entries that describe gradients stay as they are until the tensor has had one. The step
    confidence follows the correlation over coordinates with a gradient: the correlation over all
    coordinates, divided by the root of their share.
    """
    step, old = seen[:, STEP], stats.unbind(-1)
    rms, level, *logs, with_fast, with_slow, live, any_gradient = seen[:, MEASUREMENTS].unbind(-1)
    new = list(old)
    new[FIRST_RMS] = torch.where(step > 0, old[FIRST_RMS], rms)
    new[RMS] = rms
    agreement = (with_fast / live.clamp(min=1e-3).sqrt()).clamp(-1.0, 1.0)
    growth = torch.where(step > 0, level - old[MEAN_LEVEL], 0.0)
    mean_correlation = torch.lerp(with_fast, old[MEAN_CORRELATION], c.LONG_BETA)
    mean_agreement = mean_correlation / bias_correction(step + 1, c.LONG_BETA)[0]
    measured = {
        LEVEL: level,
        MEAN_LEVEL: torch.where(step > 0, torch.lerp(level, old[MEAN_LEVEL], c.LONG_BETA), level),
        **dict(zip(range(FAST_SHARE, INEQUALITY + 1), logs, strict=True)),
        FAST_CORRELATION: torch.lerp(with_fast, old[FAST_CORRELATION], c.SHORT_BETA),
        MEAN_CORRELATION: mean_correlation,
        SLOW_CORRELATION: torch.lerp(with_slow, old[SLOW_CORRELATION], c.SHORT_BETA),
        LIVE: torch.lerp(live, old[LIVE], c.SHORT_BETA),
        CONFIDENCE: next_confidence(
            old[CONFIDENCE], agreement, mean_agreement, growth, step, seen[:, KNOWN]
        ),
    }
    for entry, value in measured.items():
        new[entry] = torch.where(any_gradient > 0, value, old[entry])
    return torch.stack(new, dim=-1)


def _log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), clamped to that of 1e-7 and 1e7."""
    return (x / (reference + c.TINY**2)).clamp(1e-7, 1e7).log()
