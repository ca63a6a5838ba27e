"""What one untuned run is worth: the number of tuned runs whose best one it equals.

A user who tunes a rival tries ``k`` learning rates and keeps the best run. Its expected final loss
is exact over all subsets of the rates that were run. It falls with ``k``; where it meets the
untuned run's, that run has saved ``k`` runs. The best is chosen by the very loss that counts, in
the rival's favour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from learned_optim.evaluation.statistics import best_of, geometric_mean

#: Losses are cut off at this many times the untuned run's, and at its inverse.
LARGEST_RATIO = 10.0

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
        whose best one the untuned run equals: ``None`` if it is ahead of the best of all; the
        number of ``tasks``. ``None`` where no task counts.
    """
    ratios = []
    for task, loss in untuned.items():
        if task in tuning and 0 < loss < float("inf"):
            found = [max(min(x / loss, LARGEST_RATIO), 1 / LARGEST_RATIO) for x in tuning[task]]
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
    """The smallest ``k`` at which ``means`` are 1, linear between whole ones; at least 1."""
    if means[0] <= 1.0:
        return 1.0
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
