"""Statistics of runs: means with intervals, paired ratios, smoothing, curves.

Results that go into JSON have ``None`` where a number would be infinite or missing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Loss figures of a run are means over this many last steps.
LAST_STEPS = 10


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def median(values: Tensor) -> float:
    """The middle of ``values`` (shape ``(n,)``), or the mean of the two middle ones."""
    ordered = values.sort().values
    n = len(ordered)
    return 0.5 * (ordered[(n - 1) // 2] + ordered[n // 2]).item()


def interval(values: Tensor) -> dict[str, float | None]:
    """Mean of ``values`` (shape ``(n,)``) and half the width of its 95 % Student interval."""
    from scipy import stats

    values = values.double()
    mean = values.mean().item()
    half = stats.t.ppf(0.975, len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return {"mean": finite(mean), "half": finite(float(half))}


def ratio_interval(mine: Tensor, theirs: Tensor, resamples: int = 10_000) -> dict[str, Any]:
    """Ratio of the means of paired values with its 95 % bootstrap interval over the pairs."""
    n = len(mine)
    index = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    ratios = mine[index].mean(1) / theirs[index].mean(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    mean = (mine.mean() / theirs.mean()).item()
    return {"mean": finite(mean), "low": finite(low), "high": finite(high)}


def smooth(losses: Tensor, width: int = LAST_STEPS) -> Tensor:
    """Running mean over the last ``width`` steps (fewer at the start), same shape."""
    head = losses[:, : width - 1].cumsum(1) / torch.arange(1, width)
    return torch.cat((head, losses.unfold(1, width, 1).mean(2)), dim=1)


def curve(losses: Tensor, points: int = 200) -> dict[str, list[float | None]]:
    """Mean and 95 % interval over the seeds at up to ``points`` steps, for plotting.

    Longer runs are averaged over equal stretches of steps first.
    """
    stretch = math.ceil(losses.shape[1] / points)
    length = losses.shape[1] // stretch * stretch
    pooled = losses[:, :length].unflatten(1, (-1, stretch)).mean(2)  # (seeds, points)
    cells = [interval(column) for column in pooled.t()]
    return {
        "step": [float(i * stretch + (stretch - 1) / 2) for i in range(pooled.shape[1])],
        "mean": [short(c["mean"]) for c in cells],
        "half": [short(c["half"]) for c in cells],
    }


def short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.5g}")
