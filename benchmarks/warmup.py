"""What the warm-up of the coordinatewise and steered checkpoints costs networks from scratch.

    python -m benchmarks.warmup        # some minutes; needs $LEARNED_OPTIM_DATA

Summed loss over 100 and 200 steps with a warm-up of 20 and 50 steps, relative to none, on the
tasks of the results page's first groups. Writes docs/results/warmup.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks import no_options
from benchmarks.results import NETWORKS
from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.runs import train

OUTPUT = Path(__file__).parent.parent / "docs" / "results" / "warmup.json"
CHECKPOINTS = ("coordinatewise",)
TASKS = (*NETWORKS, *(f"{name}-torch" for name in NETWORKS), "digits", "digits-torch", "regression")
WARMUPS, HORIZONS, SEEDS = (0, 20, 50), (100, 200), 3


def measure() -> dict[str, Any]:
    """Ratios to no warm-up: per checkpoint, warm-up and horizon, over tasks."""
    data, found = DataOptions(), {}
    for name in CHECKPOINTS:
        sums: dict[tuple[str, int, int], list[float]] = {}
        for task in TASKS:
            for warmup in WARMUPS:

                def make(
                    params: Iterable[Tensor], steps: int, name: str = name, warmup: int = warmup
                ) -> Optimizer:
                    return LearnedOptimizer(params, name, warmup=warmup)

                for seed in range(SEEDS):
                    losses = train(task, make, "test", seed, max(HORIZONS), data).losses
                    for horizon in HORIZONS:
                        sums.setdefault((task, warmup, horizon), []).append(sum(losses[:horizon]))
        found[name] = {
            str(warmup): {
                str(horizon): _against_none(sums, warmup, horizon) for horizon in HORIZONS
            }
            for warmup in WARMUPS[1:]
        }
        print(name, json.dumps(found[name]), flush=True)
    return {"tasks": list(TASKS), "seeds": SEEDS, "checkpoints": found}


def _against_none(
    sums: dict[tuple[str, int, int], list[float]], warmup: int, horizon: int
) -> dict[str, float | str]:
    """Geometric mean over tasks, its spread over seeds, and the dearest task."""

    def ratio(task: str, seed: int) -> float:
        return sums[task, warmup, horizon][seed] / sums[task, 0, horizon][seed]

    by_seed = [
        math.exp(statistics.mean(math.log(ratio(task, seed)) for task in TASKS))
        for seed in range(SEEDS)
    ]
    by_task = {
        task: statistics.geometric_mean(ratio(task, s) for s in range(SEEDS)) for task in TASKS
    }
    dearest = max(by_task, key=by_task.__getitem__)
    return {
        "mean": round(statistics.geometric_mean(by_seed), 3),
        "std": round(statistics.stdev(by_seed), 3),
        "dearest": dearest,
        "its": round(by_task[dearest], 3),
    }


if __name__ == "__main__":
    no_options.parse(__doc__)
    OUTPUT.write_text(json.dumps(measure(), indent=1) + "\n")
