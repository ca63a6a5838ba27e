"""Whole runs of populations, and the scores by which they are compared.

NumPy comes with an extra, and is imported where it is used: recipes can be listed without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from learned_optim.meta.populations._base import Params, copies_of
from learned_optim.meta.populations._driver import CopiesOptimizer
from learned_optim.meta.populations._mixture import Draw, run_generators
from learned_optim.rules import UpdateRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float64]

#: Peak learning rates among which AdamW is tuned.
ADAMW_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_ADAMW_DECAY, _ADAMW_WARMUP = 0.01, 0.05
_ADAMW_BETAS, _ADAMW_EPS = (0.9, 0.999), 1e-8

# Losses are in units of the first one: bounds of what is averaged, and what is added before logs.
_LARGEST, _SMALLEST_FIRST, _OFFSET = 1e3, 1e-12, 1e-4
# Times of a run at which the loss is read for its mean, geometrically spaced.
_TIMES = 20
# Steps over which losses are averaged before their rise counts.
_RISE_WINDOW = 5
# Shares of the final and of the mean loss in the fitness, of runs with known and unknown length.
_SHARES_KNOWN, _SHARES_UNKNOWN = (0.8, 0.2), (0.5, 0.5)


def roll(rule: UpdateRule, weights: Tensor, run: Draw, seed: int) -> Array:
    """Train a population under several weights of a rule at once.

    Args:
        rule: gives architecture and configuration.
        weights: float32 of shape ``(B, number of weights)``.
        run: what :func:`draw` gave for ``seed``.
        seed: of the initial parameters, batches and jitter.

    Returns:
        Losses before each step, float64 of shape ``(steps, B)``.
    """
    return roll_held_out(rule, weights, run, seed)[0]


def roll_held_out(
    rule: UpdateRule, weights: Tensor, run: Draw, seed: int
) -> tuple[Array, Array | None]:
    """:func:`roll`, and the held-out losses, ``(2, B)``: before the first step, after the last."""
    total = run.steps if run.known else None

    def optimizer(initial: Params) -> tuple[Params, Callable[[Sequence[Tensor]], None]]:
        copies = CopiesOptimizer(rule, weights, initial, total)
        return copies.params, copies.step

    return _roll(optimizer, run, seed)


def roll_adamw(lrs: Sequence[float], run: Draw, seed: int) -> Array:
    """The same under AdamW with these peak learning rates, each a copy; returns ``(steps, lrs)``.

    They warm up over the first twentieth of the run, and, if its length is known, follow a cosine.
    """

    def optimizer(initial: Params) -> tuple[Params, Callable[[Sequence[Tensor]], None]]:
        params = copies_of(initial, len(lrs))
        return params, _adamw(list(params.values()), torch.tensor(lrs), run)

    return _roll(optimizer, run, seed)[0]


def _roll(
    optimizer: Callable[[Params], tuple[Params, Callable[[Sequence[Tensor]], None]]],
    run: Draw,
    seed: int,
) -> tuple[Array, Array | None]:
    import numpy as np

    task = run.task
    generator, jitter = run_generators(seed)
    params, step = optimizer(task.initial(generator))
    values, rows = list(params.values()), []
    with torch.no_grad():
        before = task.held_out_losses(params)
    for _ in range(run.steps):
        losses = task.losses(params, task.batch(generator))
        step(torch.autograd.grad(task.jittered(losses.sum(), jitter), values))
        rows.append(losses.detach().numpy())
    training = np.array(rows, dtype=np.float64)
    if before is None:
        return training, None
    with torch.no_grad():
        after = task.held_out_losses(params)
    assert after is not None
    return training, torch.stack((before, after)).double().numpy()


def _adamw(params: list[Tensor], lrs: Tensor, run: Draw) -> Callable[[Sequence[Tensor]], None]:
    means = [torch.zeros_like(param) for param in params]
    squares = [torch.zeros_like(param) for param in params]
    (beta, square_beta), warmup, done = _ADAMW_BETAS, max(1, _ADAMW_WARMUP * run.steps), 0

    @torch.no_grad()
    def step(grads: Sequence[Tensor]) -> None:
        nonlocal done
        schedule = min(1, (done + 1) / warmup)
        if run.known:
            schedule *= 0.5 * (1 + math.cos(math.pi * done / run.steps))
        correction, square_correction = 1 - beta ** (done + 1), 1 - square_beta ** (done + 1)
        for param, grad, mean, square in zip(params, grads, means, squares, strict=True):
            lr = (lrs * schedule).view(-1, *[1] * (param.dim() - 1))
            mean.lerp_(grad, 1 - beta)
            square.mul_(square_beta).addcmul_(grad, grad, value=1 - square_beta)
            root = (square / square_correction).sqrt() + _ADAMW_EPS
            param.mul_(1 - lr * _ADAMW_DECAY).sub_(lr * (mean / correction) / root)
        done += 1

    return step


def scores(losses: Array) -> tuple[Array, Array]:
    """Scores of every copy's run, the lower the better.

    Args:
        losses: ``(steps, B)``; what is not finite counts as a thousand times the first loss.

    Returns:
        ``(final, mean)``, each of shape ``(B,)``: the log of the mean loss of the last twentieth,
        and the mean of the log loss at geometrically spaced times, both relative to the first
        loss of all copies.
    """
    import numpy as np

    steps = len(losses)
    bounded = _relative(losses)

    def log_mean(low: int, high: int) -> Array:
        mean: Array = np.log(np.maximum(bounded[low:high].mean(0), 0) + _OFFSET)
        return mean

    final = log_mean(-max(5, steps // 20), steps)
    times = np.unique(np.geomspace(1, steps, _TIMES).astype(int))
    mean: Array = np.mean([log_mean(max(0, t - max(1, t // 5)), t) for t in times], 0)
    return final, mean


def rise(losses: Array) -> Array:
    """How far the loss ever was, and on average, above the first; in logs, shape ``(B,)``.

    Runs that damage what they began with come back in the end, so that the final loss does not
    tell. Losses are averaged over five steps, because batches differ.
    """
    import numpy as np

    bounded = _relative(losses)
    sums = np.cumsum(np.concatenate((np.zeros_like(bounded[:1]), bounded)), 0)
    window = min(_RISE_WINDOW, len(bounded))
    above: Array = np.log(np.maximum((sums[window:] - sums[:-window]) / window, 1.0))
    return above.max(0) + 0.5 * above.mean(0)


def fitness(losses: Array, known: bool, held_out: Array | None = None) -> Array:
    """What evolution strategies minimize, of every copy, shape ``(B,)``.

    Shares of the final and the mean loss (:func:`scores`), and the whole of :func:`rise`. Where
    examples are held out, their loss counts for half of the final one.
    """
    import numpy as np

    final, mean = scores(losses)
    if held_out is not None:
        last = _relative(held_out)[-1]
        final = 0.5 * final + 0.5 * np.log(np.maximum(last, 0) + _OFFSET)
    final_share, mean_share = _SHARES_KNOWN if known else _SHARES_UNKNOWN
    return final_share * final + mean_share * mean + rise(losses)


def _relative(losses: Array) -> Array:
    """Losses in units of the first one, within bounds."""
    import numpy as np

    first = np.nanmax([abs(losses[0].mean()), _SMALLEST_FIRST])
    with np.errstate(invalid="ignore"):  # a first loss that is infinite makes everything NaN
        finite = np.where(np.isfinite(losses), losses, np.inf) / first
    return np.clip(finite, -_LARGEST, _LARGEST)
