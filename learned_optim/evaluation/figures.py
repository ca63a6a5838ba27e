"""The figures of an evaluation, from its runs: plain data, ready for JSON.

Means over tasks are geometric, of ratios within 1/10 and 10; a run that diverged counts as 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learned_optim.evaluation.runs import OptimizerSpec, Run
from learned_optim.evaluation.statistics import (
    curve,
    cut_off,
    finite,
    geometric_mean,
    interval,
    ratio_interval,
)

#: Share of the run whose mean loss is the final one.
FINAL_SHARE = 0.05


def final_loss(run: Run) -> float:
    """Mean loss of a run's last 5 %; infinite if it diverged."""
    count = math.ceil(FINAL_SHARE * len(run.losses))
    return math.fsum(run.losses[-count:]) / count


@dataclass(frozen=True)
class Figures:
    """Figures of one optimizer on one task; tensors are float64, an entry per seed.

    Attributes:
        losses: means over equal stretches of the steps, ``(seeds, stretches)``.
        final: mean loss of the last 5 %.
        test: held-out figures by name; the loss is infinite where the run diverged.
        step_seconds: processor seconds per step in the optimizer.
    """

    optimizer: OptimizerSpec
    lr: float
    steps: int
    losses: Tensor
    final: Tensor
    test: dict[str, Tensor]
    step_seconds: Tensor

    @staticmethod
    def of(optimizer: OptimizerSpec, lr: float, steps: int, found: Sequence[Run]) -> Figures:
        """The figures of an optimizer's test runs."""
        column = partial(torch.tensor, dtype=torch.float64)
        names = sorted({name for run in found for name in run.test})
        missing = {name: math.inf if name == "loss" else math.nan for name in names}
        tests = [{**missing, **run.test} for run in found]
        return Figures(
            optimizer,
            lr,
            steps,
            column([run.losses for run in found]),
            column([final_loss(run) for run in found]),
            {name: column([test[name] for test in tests]) for name in names},
            column([run.optimizer_seconds for run in found]) / steps,
        )

    @property
    def held_out(self) -> Tensor:
        """The held-out loss, ``(seeds,)``; infinite where it was not measured."""
        return self.test.get("loss", torch.full_like(self.final, math.inf))

    @property
    def diverged(self) -> Tensor:
        """Seeds that diverged, ``(seeds,)`` bool."""
        return ~self.final.isfinite()


def summarize(
    figures: dict[str, dict[str, Figures]],
    tuned: Sequence[str],
    untuned: Sequence[str],
    by: str = "final",
) -> dict[str, Any]:
    """The summary of an evaluation: per task, and over all tasks.

    ``untuned_pairs`` has a row for every untuned optimizer, over all others, tuned ones included.

    Args:
        figures: by task and optimizer.
        tuned: labels of the rivals that were tuned per task.
        untuned: labels of all others.
        by: the loss that decides which rival is best, ``"final"`` or ``"sum"``.
    """
    tasks, best_tuned = {}, []
    for task, entries in figures.items():
        best = _best([entries[label] for label in tuned], by)
        best_tuned.append(best)
        tasks[task] = {
            "steps": next(iter(entries.values())).steps,
            "best_tuned": best.optimizer.label if best else None,
            "optimizers": {label: _row(entry, best) for label, entry in entries.items()},
        }
    overall = {
        label: _overall([each[label] for each in figures.values()], best_tuned)
        for label in (*untuned, *tuned)
    }
    pairs = {
        label: {
            other: geometric_mean([ratio(e[label].final, e[other].final) for e in figures.values()])
            for other in (*untuned, *tuned)
            if other != label
        }
        for label in untuned
    }
    return {"tasks": tasks, "overall": overall, "untuned_pairs": pairs}


def ratio(mine: Tensor, theirs: Tensor) -> float:
    """Ratio of two means over seeds, cut off at 1/10 and 10; 10 where ``mine`` diverged."""
    above, below = mine.mean().item(), theirs.mean().item()
    return cut_off(above / below if math.isfinite(above) else math.inf)


def _best(entries: Sequence[Figures], by: str) -> Figures | None:
    """The entry with the smallest loss over the seeds; none if all diverged."""
    alive = [e for e in entries if not e.diverged.any()]
    return min(
        alive, key=lambda e: (e.final if by == "final" else e.losses).mean().item(), default=None
    )


def _row(entry: Figures, best: Figures | None) -> dict[str, Any]:
    """The figures of one optimizer on one task, beside the best tuned rival's."""
    row: dict[str, Any] = {
        "lr": entry.lr,
        "diverged": int(entry.diverged.sum()),
        "final": interval(entry.final),
        "sum": interval(entry.losses.mean(1) * entry.steps),
        "test": {name: interval(values) for name, values in entry.test.items()},
        "curve": curve(entry.losses, entry.steps),
        "optimizer_milliseconds": interval(1000 * entry.step_seconds),
    }
    if best is not None:
        row["ratio"] = ratio_interval(entry.final, best.final)
    return row


def _overall(entries: Sequence[Figures], best_tuned: Sequence[Figures | None]) -> dict[str, Any]:
    """One optimizer over all tasks, against the best tuned rival of each."""
    pairs = zip(entries, best_tuned, strict=True)
    compared = [(entry, best) for entry, best in pairs if best is not None]
    times = torch.stack([1000 * entry.step_seconds.mean() for entry in entries])
    row: dict[str, Any] = {
        "tasks": len(entries),
        "diverged": torch.cat([entry.diverged for entry in entries]).double().mean().item(),
        "optimizer_milliseconds": finite(times[times.isfinite()].mean().item()),
    }
    if compared:
        ratios = [ratio(entry.final, best.final) for entry, best in compared]
        row |= {
            "ratio": geometric_mean(ratios),
            "test_ratio": geometric_mean(
                [ratio(e.held_out, best.held_out) for e, best in compared if best.test]
            ),
            "sum_ratio": geometric_mean(
                [ratio(e.losses.mean(1), best.losses.mean(1)) for e, best in compared]
            ),
            "at_most_tuned": sum(r <= 1.0 for r in ratios),
        }
    return row
