"""Statistics of runs: intervals, paired ratios, curves, the worth of a run.

Results that go into JSON have ``None`` where a number would be infinite or missing.

The worth of an untuned run is the number of tuned runs whose best one it equals. A user who tunes a
rival tries ``k`` learning rates and keeps the best run. Its expected final loss is exact over all
subsets of the rates that were run. It falls with ``k``; where it meets the untuned run's, that run
has saved ``k`` runs. The best is chosen by the very loss that counts, in the rival's favour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Ratios are cut off here and at its inverse before they are averaged over tasks.
LARGEST_RATIO = 10.0


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def cut_off(ratio: float) -> float:
    """A ratio of losses within 1/10 and 10: no single task decides a mean."""
    return min(max(ratio, 1.0 / LARGEST_RATIO), LARGEST_RATIO)


def interval(values: Tensor) -> dict[str, float | None]:
    """Mean of ``values`` ``(n,)`` and half the width of its 95 % Student interval.

    Half the width is ``None`` where there is one value.
    """
    from scipy import stats

    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return {"mean": finite(mean), "half": None}
    half = stats.t.ppf(0.975, len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return {"mean": finite(mean), "half": finite(float(half))}


def ratio_interval(mine: Tensor, theirs: Tensor) -> dict[str, float | None]:
    """Ratio of two means with its 95 % bootstrap interval over the pairs."""
    return _bootstrapped((mine, theirs), lambda a, b, axis: a.mean(axis) / b.mean(axis))


def geometric_mean(ratios: Sequence[float]) -> dict[str, float | None]:
    """Geometric mean of positive numbers with its 95 % bootstrap interval over them."""
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    found = _bootstrapped((logs,), lambda x, axis: x.mean(axis))
    return {name: None if x is None else math.exp(x) for name, x in found.items()}


def _bootstrapped(values: tuple[Tensor, ...], statistic: Any) -> dict[str, float | None]:
    """A statistic of paired values, each ``(n,)``, between its 2.5 and 97.5 % percentiles.

    The interval is ``None`` where there is one pair, and so is the statistic where a value is not
    finite.
    """
    import numpy
    from scipy import stats

    data = tuple(v.double().numpy() for v in values)
    if not all(len(d) and numpy.isfinite(d).all() for d in data):
        return {"mean": None, "low": None, "high": None}
    mean = float(statistic(*data, axis=-1))
    if len(data[0]) < 2:
        return {"mean": mean, "low": None, "high": None}
    found = stats.bootstrap(
        data, statistic, paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, batch=1000, random_state=numpy.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def pooled(losses: Sequence[float], stretches: int) -> list[float]:
    """Means over ``stretches`` equal stretches of ``losses``, or ``losses`` if there are fewer."""
    count = min(stretches, len(losses))
    edges = [round(i * len(losses) / count) for i in range(count + 1)]
    return [math.fsum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]


def curve(losses: Tensor, steps: int) -> dict[str, list[float | None]]:
    """Mean and 95 % interval over the seeds of ``losses``, ``(seeds, stretches)``, for plotting."""
    cells = [interval(column) for column in losses.t()]
    return {
        "step": [(i + 0.5) * steps / len(cells) for i in range(len(cells))],
        "mean": [_short(c["mean"]) for c in cells],
        "half": [_short(c["half"]) for c in cells],
    }


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


# ---- what one untuned run is worth

#: Groups of the field by the start of a task's name.
GROUPS = {
    "vision": ("cifar10", "fashion", "autoencoder", "variational", "denoiser", "noisy-labels"),
    "language": ("char-lm",),
    "tables": ("tabular", "regression", "heavy-tails", "rare-classes"),
    "embeddings": ("matrix-factorization", "skip-gram"),
    "physics": ("physics", "coordinates", "policy"),
    "fine-tuning": ("finetune", "lora"),
}


def worth(
    untuned: Mapping[str, float], tuning: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """The best of ``k`` tuned runs relative to one untuned run, over all tasks.

    Args:
        untuned: final loss of the untuned run, by task; tasks without a finite one do not count.
        tuning: final losses of the rival's runs by task, one for each learning rate, infinite where
            it diverged.

    Returns:
        By ``k`` from 1, the geometric mean over tasks of the expected loss as ``mean``, between
        ``low`` and ``high`` (95 %, bootstrap over tasks); ``equals``, the number of tuned runs
        whose best one the untuned run equals: 0 if one run is ahead of it, ``None`` if it is
        ahead of the best of all; the number of ``tasks``. ``None`` where no task counts.
    """
    ratios = []
    for task, loss in untuned.items():
        if task in tuning and 0 < loss < float("inf"):
            found = [cut_off(x / loss) for x in tuning[task]]
            ratios.append([best_of(found, k + 1) for k in range(len(found))])
    if not ratios:
        return None
    cells = [geometric_mean(column) for column in zip(*ratios, strict=True)]
    means = [float(cell["mean"] or 0.0) for cell in cells]
    return {
        "mean": means,
        "low": [cell["low"] for cell in cells],
        "high": [cell["high"] for cell in cells],
        "equals": _crossing(means),
        "tasks": len(ratios),
    }


def _crossing(means: Sequence[float]) -> float | None:
    """The smallest ``k`` at which ``means`` are 1, linear between whole ones; 0 if it is below."""
    if means[0] <= 1.0:
        return float(means[0] == 1.0)
    for k, (above, below) in enumerate(pairwise(means), start=1):
        if below <= 1.0:
            return k + (above - 1.0) / (above - below)
    return None


def worth_by_group(
    untuned: Mapping[str, float], tuning: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """:func:`worth` over ``all`` tasks, and over those of every group of :data:`GROUPS`."""
    members = {
        group: {t: loss for t, loss in untuned.items() if t.startswith(starts)}
        for group, starts in GROUPS.items()
    }
    found = {group: worth(tasks, tuning) for group, tasks in {"all": untuned, **members}.items()}
    return {group: result for group, result in found.items() if result is not None}


def best_of(values: Sequence[float], k: int) -> float:
    """Expected minimum of ``k`` different ones of ``values``, exact over all subsets."""
    ordered, n = sorted(values), len(values)
    # The i-th smallest is the minimum of those subsets whose other members are larger.
    total = math.fsum(v * math.comb(n - 1 - i, k - 1) for i, v in enumerate(ordered))
    return total / math.comb(n, k)
