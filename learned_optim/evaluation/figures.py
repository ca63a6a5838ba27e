"""The figures of an evaluation, from its runs: plain data, ready for JSON.

Means over tasks are geometric, of ratios within 1/10 and 10; a run that diverged counts as 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
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
    smooth,
)

#: Share of the run whose mean loss is the final one.
FINAL_SHARE = 0.05
#: A run stalls if it makes less than this share of the progress of the best tuned rival.
STALLED_SHARE = 0.1


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
    state_bytes: int

    @staticmethod
    def of(optimizer: OptimizerSpec, lr: float, steps: int, found: Sequence[Run]) -> Figures:
        """The figures of an optimizer's test runs."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        names = sorted({name for run in found for name in run.test})
        missing = {name: math.inf if name == "loss" else math.nan for name in names}
        tests = [{**missing, **run.test} for run in found]
        return Figures(
            optimizer,
            lr,
            steps,
            torch.tensor([run.losses for run in found], dtype=torch.float64),
            column([final_loss(run) for run in found]),
            {name: column([test[name] for test in tests]) for name in names},
            column([run.optimizer_seconds for run in found]) / steps,
            max(run.state_bytes for run in found),
        )

    @property
    def held_out(self) -> Tensor:
        """The held-out loss, ``(seeds,)``; infinite where it was not measured."""
        return self.test.get("loss", torch.full_like(self.final, math.inf))

    @property
    def diverged(self) -> Tensor:
        """Seeds that diverged, ``(seeds,)`` bool."""
        return ~self.final.isfinite()

    def stalled(self, rival: Figures | None) -> Tensor:
        """Seeds that made hardly any progress without diverging, ``(seeds,)`` bool."""
        if rival is None:
            return torch.zeros_like(self.diverged)
        wanted = STALLED_SHARE * (rival.losses[:, 0] - rival.final)
        return (self.losses[:, 0] - self.final < wanted) & ~self.diverged

    def steps_to(self, target: Tensor) -> Tensor:
        """Steps until a running mean over 5 % of the run is at most ``target``.

        Shape ``(seeds,)``, as ``target``; infinite where it never is.
        """
        width = math.ceil(FINAL_SHARE * self.losses.shape[1])
        reached = smooth(self.losses, width) <= target.unsqueeze(1)
        steps = (reached.int().argmax(1) + 1).double() * self.steps / self.losses.shape[1]
        return torch.where(reached.any(1), steps, math.inf)


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
        "stalled": int(entry.stalled(best).sum()),
        "final": interval(entry.final),
        "sum": interval(entry.losses.mean(1) * entry.steps),
        "test": {name: interval(values) for name, values in entry.test.items()},
        "curve": curve(entry.losses, entry.steps),
        "optimizer_milliseconds": interval(1000 * entry.step_seconds),
        "state_bytes": entry.state_bytes,
    }
    if best is not None:
        row["ratio"] = ratio_interval(entry.final, best.final)
    return row


def _overall(entries: Sequence[Figures], best_tuned: Sequence[Figures | None]) -> dict[str, Any]:
    """One optimizer over all tasks, against the best tuned rival of each."""
    pairs = list(zip(entries, best_tuned, strict=True))
    compared = [(entry, best) for entry, best in pairs if best is not None]
    runs = sum(len(entry.final) for entry in entries)
    row: dict[str, Any] = {
        "tasks": len(entries),
        "diverged": sum(int(entry.diverged.sum()) for entry in entries) / runs,
        "stalled": sum(int(entry.stalled(best).sum()) for entry, best in pairs) / runs,
        "optimizer_milliseconds": _mean(
            [1000 * entry.step_seconds.mean().item() for entry in entries]
        ),
        "state_bytes": sum(entry.state_bytes for entry in entries),
    }
    if compared:
        ratios = [ratio(entry.final, best.final) for entry, best in compared]
        reached = [median(e.steps_to(best.final).tolist()) / e.steps for e, best in compared]
        row |= {
            "ratio": geometric_mean(ratios),
            "test_ratio": geometric_mean(
                [ratio(e.held_out, best.held_out) for e, best in compared if best.test]
            ),
            "sum_ratio": geometric_mean(
                [ratio(e.losses.mean(1), best.losses.mean(1)) for e, best in compared]
            ),
            "at_most_tuned": sum(r <= 1.0 for r in ratios),
            "within_5_percent": sum(r <= 1.05 for r in ratios),
            "reached": sum(map(math.isfinite, reached)),
            "step_share_to_target": finite(median(reached)),
        }
    return row


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the finite ``values``, if there are any."""
    alive = [x for x in values if math.isfinite(x)]
    return sum(alive) / len(alive) if alive else None
