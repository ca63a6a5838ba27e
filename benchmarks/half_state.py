"""What bfloat16 state costs: the summed loss with it, relative to float32 state.

    python -m benchmarks.half_state        # a minute; needs $LEARNED_OPTIM_DATA

The thesis's networks in both initializations, the same weights and batches for both; writes
docs/performance/half-state.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import no_options
from benchmarks.results import GENERAL, NETWORKS
from benchmarks.wall_clock import STEPS, train
from learned_optim import LearnedOptimizer
from learned_optim.summary import table

OUTPUT = Path(__file__).parent.parent / "docs" / "performance" / "half-state.json"
SEEDS = 3


def summed(task_name: str, checkpoint: str, dtype: torch.dtype, seed: int) -> float:
    """Loss summed over one run with per-coordinate state of ``dtype``."""
    losses, _ = train(
        "half state", task_name, seed,
        lambda params: LearnedOptimizer(params, checkpoint, state_dtype=dtype),
    )  # fmt: skip
    return sum(losses)


def measure() -> dict[str, Any]:
    """Per checkpoint and task, the mean ratio over seeds and its standard error."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"seeds": SEEDS, "steps": STEPS, "checkpoints": {}}
    for checkpoint in GENERAL:
        rows = found["checkpoints"][checkpoint] = {}
        for task in [name + suffix for suffix in ("", "-torch") for name in NETWORKS]:
            ratios = [
                summed(task, checkpoint, torch.bfloat16, seed)
                / summed(task, checkpoint, torch.float32, seed)
                for seed in range(SEEDS)
            ]
            error = statistics.stdev(ratios) / SEEDS**0.5
            rows[task] = {"ratio": round(statistics.mean(ratios), 4), "error": round(error, 4)}
            print(checkpoint, task, rows[task], flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """Ratios by task and checkpoint."""
    names = list(found["checkpoints"])
    rows = [
        [task]
        + [
            f"{found['checkpoints'][name][task]['ratio']:.3f} "
            f"± {found['checkpoints'][name][task]['error']:.3f}"
            for name in names
        ]
        for task in found["checkpoints"][names[0]]
    ]
    return table(["task", *(f"`{name}`" for name in names)], rows)


if __name__ == "__main__":
    no_options.parse(__doc__)
    result = measure()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
