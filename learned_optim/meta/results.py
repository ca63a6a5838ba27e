"""An optimizer's test runs on a task at a horizon, and their figures as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta.baselines import LR_GRID
from learned_optim.meta.runs import OptimizerSpec, Run, RunSpec
from learned_optim.meta.statistics import (
    LAST_STEPS,
    curve,
    finite,
    interval,
    median,
    ratio_interval,
    smooth,
)

#: Long runs also report the worst smoothed loss after this step.
SETTLED_STEP = 1000

#: A learning rate tuned to one of these might have been better still outside the grid.
_EDGES = (LR_GRID[0], LR_GRID[-1])


@dataclass(frozen=True)
class Result:
    """An optimizer on a task at a horizon: its test runs and how its lr was chosen.

    Attributes:
        lr: the learning rate of the runs.
        tuned_lr: the best on tuning seeds; another one where that diverged on a test seed.
        by: ``"sum"`` or ``"final"``: what the learning rate was chosen by.
        runs: finished runs by key, of which these are some.
    """

    optimizer: OptimizerSpec
    lr: float
    tuned_lr: float
    horizon: int
    by: str
    specs: Sequence[RunSpec]
    runs: Mapping[str, Run]

    def diverges(self) -> bool:
        """Whether a loss within the horizon is known to be infinite on some test seed."""
        done = [self.runs[s.key] for s in self.specs if s.key in self.runs]
        return any(math.isinf(run.losses[self.horizon - 1]) for run in done)

    def losses(self) -> Tensor:
        """Losses of the runs up to its horizon, float64, ``(seeds, horizon)``."""
        rows = [self.runs[spec.key].losses[: self.horizon] for spec in self.specs]
        return torch.tensor(rows, dtype=torch.float64)

    def step_seconds(self) -> Tensor:
        """Seconds per step of the runs, float64, ``(seeds,)``."""
        seconds = [self.runs[spec.key].seconds for spec in self.specs]
        return torch.tensor(seconds, dtype=torch.float64) / self.specs[0].steps

    def row(self) -> dict[str, Any]:
        """The figures of one optimizer at one horizon."""
        losses = self.losses()
        row: dict[str, Any] = {
            "kind": self.optimizer.kind,
            "lr": self.lr,
            "tuned_lr": self.tuned_lr,
            "lr_at_edge": self.optimizer.kind == "baseline" and self.lr in _EDGES,
            "diverged": int(losses[:, -1].isinf().sum()),
            "sum": interval(losses.sum(1)),
            "last": interval(losses[:, -LAST_STEPS:].mean(1)),
            "milliseconds_per_step": interval(1000 * self.step_seconds()),
            "curve": curve(losses),
        }
        if self.horizon == self.specs[0].steps:  # held-out figures are taken after the last step
            tests = [self.runs[spec.key].test for spec in self.specs]
            names = sorted({name for test in tests for name in test})
            row["test"] = {
                n: interval(torch.tensor([t.get(n, math.nan) for t in tests])) for n in names
            }
        if self.horizon > SETTLED_STEP:
            row["worst_after_1000"] = interval(smooth(losses)[:, SETTLED_STEP:].amax(1))
        return row

    def ratios(self, best: Result) -> dict[str, Any]:
        """The runs against the baseline with the best summed loss, seed by seed."""
        mine, theirs = self.losses(), best.losses()
        return {
            "ratio": ratio_interval(mine.sum(1), theirs.sum(1)),
            "ratio_last": ratio_interval(
                mine[:, -LAST_STEPS:].mean(1), theirs[:, -LAST_STEPS:].mean(1)
            ),
        }

    def time_to_target(self, best: Result) -> dict[str, Any]:
        """When the runs get to the last loss of the baseline that is best in it, seed by seed."""
        target = best.losses()[:, -LAST_STEPS:].mean(1, keepdim=True)
        reached = smooth(self.losses()) <= target  # (seeds, horizon)
        # Over seeds the median: one that never gets there counts as infinity and spoils nothing.
        steps = torch.where(reached.any(1), reached.int().argmax(1) + 1.0, math.inf)
        return {
            "steps_to_best": finite(median(steps)),
            "seconds_to_best": finite(median(steps * self.step_seconds())),
        }


def best_baseline(entries: Sequence[Result], by: str) -> Result | None:
    """The baseline with the smallest mean loss over test seeds; none if all diverged.

    Args:
        by: ``"sum"``, tuned by and compared in the summed loss; ``"final"``, both in the
            mean over the last :data:`LAST_STEPS`.
    """

    def score(entry: Result) -> float:
        losses = entry.losses()
        return (losses if by == "sum" else losses[:, -LAST_STEPS:]).sum().item()

    tuned = [e for e in entries if e.optimizer.kind == "baseline" and e.by == by]
    return min((e for e in tuned if math.isfinite(score(e))), key=score, default=None)
