"""Statistics of runs: means with intervals, paired ratios, smoothing, curves.

Results that go into JSON have ``None`` where a number would be infinite or missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def median(values: Tensor) -> float:
    """The middle of ``values`` (shape ``(n,)``), or the mean of the two middle ones."""
    ordered = values.sort().values
    n = len(ordered)
    return 0.5 * (ordered[(n - 1) // 2] + ordered[n // 2]).item()


def interval(values: Tensor) -> dict[str, float | None]:
    """Mean of ``values`` (shape ``(n,)``) and half the width of its 95 % Student interval.

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
    """Ratio of the means of paired values with its 95 % bootstrap interval over the pairs."""

    def ratio(a: Any, b: Any, axis: int) -> Any:
        return a.mean(axis) / b.mean(axis)

    return _bootstrapped((mine, theirs), ratio)


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


def performance_profile(
    values: Mapping[str, Sequence[float]], factors: Sequence[float]
) -> dict[str, list[float]]:
    """Share of problems on which a solver is within a factor of the best (Dolan and More 2002).

    Args:
        values: per solver, one positive cost per problem; infinite where it failed.
        factors: 1 and above.

    Returns:
        Per solver, one share for each factor.
    """
    if not values:
        return {}
    table = torch.tensor(list(values.values()), dtype=torch.float64)  # (solvers, problems)
    best = table.amin(0)
    within = [table <= factor * best for factor in factors]
    shares = torch.stack([(w & table.isfinite()).double().mean(1) for w in within], 1)
    return dict(zip(values, shares.tolist(), strict=True))


def pooled(losses: Sequence[float], stretches: int) -> list[float]:
    """Means over ``stretches`` equal stretches of ``losses``, or ``losses`` if there are fewer."""
    count = min(stretches, len(losses))
    edges = [round(i * len(losses) / count) for i in range(count + 1)]
    return [math.fsum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]


def smooth(losses: Tensor, width: int) -> Tensor:
    """Running mean over the last ``width`` columns (fewer at the start), same shape."""
    head = losses[:, : width - 1].cumsum(1) / torch.arange(1, width)
    return torch.cat((head, losses.unfold(1, width, 1).mean(2)), dim=1)


def curve(losses: Tensor, steps: int) -> dict[str, list[float | None]]:
    """Mean and 95 % interval over the seeds, for plotting.

    Args:
        losses: means over equal stretches of a run, ``(seeds, stretches)``.
        steps: length of the run.
    """
    cells = [interval(column) for column in losses.t()]
    return {
        "step": [(i + 0.5) * steps / len(cells) for i in range(len(cells))],
        "mean": [_short(c["mean"]) for c in cells],
        "half": [_short(c["half"]) for c in cells],
    }


def best_of(values: Sequence[float], k: int) -> float:
    """Expected minimum of ``k`` different ones of ``values``, exact over all subsets."""
    ordered, n = sorted(values), len(values)
    # The i-th smallest is the minimum of those subsets whose other members are larger.
    return math.fsum(v * math.comb(n - 1 - i, k - 1) for i, v in enumerate(ordered)) / math.comb(
        n, k
    )


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")
