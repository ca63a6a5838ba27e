"""What a rule with one network per tensor remembers of the tensor's past, and reads of it.

A step is observed as ``(m, f)`` numbers: its time, then its measurements. The network reads the
time of the step and the measurements of the step before, which are in ``stats``: so one pass over
the coordinates does everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rules._features import TINY, bias_correction

# Columns of an observed step: its number and schedule, the scale and tallness of the tensor; inputs
# of the network; measurements.
STEP, SCHEDULE, NATURAL, TALLNESS = range(4)
KNOWN = 9  # whether the length of the run is known; one of the next
TIME_INPUTS, ROTATED, MEASUREMENTS = slice(4, 13), 13, slice(14, None)

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
    TRUST,  # log of the trust
) = range(14)
STATS = 14
INPUTS = 21  # without the trust

# Decays of the averages in ``stats``.
_SHORT, _LONG = 0.9, 0.99
# Of the gradient; less is no sign that steps are too long.
_LEAST_GROWTH = 0.3


class Trust(NamedTuple):
    """How the log of a tensor's trust moves: by a gain times the correlation that is measured.

    Attributes:
        start: its value at the first step, and its lower bound; 0 is the upper one.
        gain: until it has reached 0, where it stays.
        later_gain: from then on, after the warm-up, where the length of the run is unknown; 0: it
            stays there, too.
        known_gain: the same where the length of the run is known.
        margin: added to the correlation there, where a schedule anneals anyway.
        growth: if above 0, it falls there by the gain and this times the growth of the gradient,
            less 0.3, while the mean correlation is below minus the margin; the correlation only
            lets it grow back.
        warmup: steps of that warm-up, at least 1.
    """

    start: float = 0.0
    gain: float = 0.0
    later_gain: float = 0.0
    known_gain: float = 0.0
    margin: float = 0.0
    growth: float = 0.0
    warmup: float = 1.0

    def after(
        self,
        log: Tensor,
        agreement: Tensor,
        mean_agreement: Tensor,
        growth: Tensor,
        step: Tensor,
        known: Tensor,
    ) -> Tensor:
        """The log of the trust after a step, ``(m,)``, from that before it.

        ``growth`` is the log of the gradient's mean square, less the moving average of that.

        It falls no lower than the rate of a run without end would, ``(1 + step / warmup)^(-1/2)``;
        so a trust below that has not been whole yet.
        """
        gain, low = torch.where(log < 0, self.gain, 0.0), torch.full_like(log, self.start)
        if self.later_gain > 0 or self.known_gain > 0:
            floor = (-0.5 * (1 + step / self.warmup).log()).clamp(min=self.start)
            later_gain = torch.where(known > 0, self.known_gain, self.later_gain).to(log.dtype)
            later = (later_gain > 0) & (step >= self.warmup) & (log >= floor)
            gain = torch.where(later, later_gain, gain)
            annealed = later & (known > 0)
            judged = agreement + self.margin
            if self.growth > 0:
                lost = self.growth * (growth - _LEAST_GROWTH).clamp(min=0.0)
                lost = torch.where(mean_agreement < -self.margin, lost, 0.0)
                judged = torch.where(agreement > 0, agreement, -lost)
            agreement = torch.where(annealed, judged, agreement)
            low = torch.where(later, floor, low)
        return torch.maximum(log + gain * agreement, low).clamp(max=0.0)


NO_TRUST = Trust()


def measurements(means: Tensor) -> tuple[Tensor, ...]:
    """What one step shows of each tensor, 11 of shape ``(m,)``.

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
        (square + TINY**2).log(),
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
    """Root mean square of each tensor at the step before; at the first step, of this one; (m,)."""
    return torch.where(seen[:, STEP] > 0, stats[:, entry], seen[:, MEASUREMENTS][:, 0])


def live_share(seen: Tensor, stats: Tensor) -> Tensor:
    """Share of coordinates with a gradient in the steps before, 1 at the first; (m,)."""
    step = seen[:, STEP]
    correction = bias_correction(step.clamp(min=1), _SHORT)[0]
    return torch.where(step > 0, stats[:, LIVE] / correction, 1.0)


def network_inputs(
    seen: Tensor, stats: Tensor, trust: bool = False, rotated: bool = False
) -> Tensor:
    """The network's inputs, ``(m, 21)``, more with trust and eigenbasis.

    Args:
        seen: the step, ``(m, f)``.
        stats: of the steps before, ``(m, 14)``.
        trust: whether the network reads it.
        rotated: whether the network reads which tensors are rotated.
    """
    step, natural = seen[:, STEP], seen[:, NATURAL]
    rms, first = scale_of(seen, stats), scale_of(seen, stats, FIRST_RMS)
    started = (step > 0).to(stats.dtype)
    short, long = (
        started / bias_correction(step.clamp(min=1), beta)[0] for beta in (_SHORT, _LONG)
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
        *([of[TRUST] / 4] if trust else []),
        *([seen[:, ROTATED]] if rotated else []),
    )
    return torch.stack(inputs, dim=-1)


def next_stats(seen: Tensor, stats: Tensor, trust: Trust = NO_TRUST) -> Tensor:
    """``stats`` after the step, ``(m, 14)``.

    Entries that describe gradients stay as they are until the tensor has had one. The trust moves
    with the correlation of the gradient with the fast momentum before it, about that of the
    coordinates with a gradient: over the root of their share.
    """
    step, old = seen[:, STEP], stats.unbind(-1)
    rms, level, *logs, with_fast, with_slow, live, any_gradient = seen[:, MEASUREMENTS].unbind(-1)
    new = list(old)
    new[FIRST_RMS] = torch.where(step > 0, old[FIRST_RMS], rms)
    new[RMS] = rms
    agreement = (with_fast / live.clamp(min=1e-3).sqrt()).clamp(-1.0, 1.0)
    growth = torch.where(step > 0, level - old[MEAN_LEVEL], 0.0)
    mean_correlation = torch.lerp(with_fast, old[MEAN_CORRELATION], _LONG)
    mean_agreement = mean_correlation / bias_correction(step + 1, _LONG)[0]
    measured = {
        LEVEL: level,
        MEAN_LEVEL: torch.where(step > 0, torch.lerp(level, old[MEAN_LEVEL], _LONG), level),
        **dict(zip(range(FAST_SHARE, INEQUALITY + 1), logs, strict=True)),
        FAST_CORRELATION: torch.lerp(with_fast, old[FAST_CORRELATION], _SHORT),
        MEAN_CORRELATION: mean_correlation,
        SLOW_CORRELATION: torch.lerp(with_slow, old[SLOW_CORRELATION], _SHORT),
        LIVE: torch.lerp(live, old[LIVE], _SHORT),
        TRUST: trust.after(old[TRUST], agreement, mean_agreement, growth, step, seen[:, KNOWN]),
    }
    for entry, value in measured.items():
        new[entry] = torch.where(any_gradient > 0, value, old[entry])
    return torch.stack(new, dim=-1)


def _log_ratio(x: Tensor, reference: Tensor) -> Tensor:
    """log(x / reference), clamped to that of 1e-7 and 1e7."""
    return (x / (reference + TINY**2)).clamp(1e-7, 1e7).log()
