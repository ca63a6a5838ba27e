"""The default on the quick tier: against tuned AdamW of field-quick.json, tuned Muon and SOAP.

    python -m benchmarks quick --minutes 30      # makes missing runs; 0 only prints the table

Runs are kept in docs/results/quick-runs.jsonl. Rivals are tuned over three learning rates on a
tuning seed; figures are means over two test seeds. The committed runs are of one thread of an AMD
EPYC. Intervals are bootstrapped over tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from learned_optim.evaluation.baselines import make_baseline
from learned_optim.evaluation.figures import final_loss
from learned_optim.evaluation.runs import learned_optimizer, train
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks import field_horizon, field_tasks

FOLDER = Path(__file__).parent.parent / "docs" / "results"
LOG, FIELD = FOLDER / "quick-runs.jsonl", FOLDER / "field-quick.json"
RIVALS, RATES, SEEDS = ("muon-cosine", "soap-cosine"), (3e-3, 1e-2, 3e-2), (0, 1)

Key = tuple[str, str, float | None, str, int]


def read() -> dict[Key, dict[str, Any]]:
    """The finished runs: by task, optimizer, learning rate, phase and seed."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    return {(r["task"], r["optimizer"], r["lr"], r["phase"], r["seed"]): r for r in lines}


def finish(runs: dict[Key, dict[str, Any]], key: Key) -> None:
    """Makes a run that is missing, and logs it."""
    task, optimizer, lr, phase, seed = key
    if key not in runs:

        def make(params: list[torch.Tensor], total_steps: int) -> torch.optim.Optimizer:
            if lr is None:
                return learned_optimizer(params, optimizer, total_steps)
            return make_baseline(optimizer, params, lr, total_steps)

        done = train(task, make, phase, seed, field_horizon(task).quick, DataOptions())
        names = ("task", "optimizer", "lr", "phase", "seed")
        runs[key] = {
            **dict(zip(names, key, strict=True)),
            "final": final_loss(done),
            "test": done.test,
            "seconds": round(done.seconds, 2),
            "optimizer_seconds": round(done.optimizer_seconds, 2),
        }
        with LOG.open("a") as file:
            file.write(json.dumps(runs[key]) + "\n")


def tuned(runs: dict[Key, dict[str, Any]], task: str, rival: str) -> float:
    """The rate with the lowest final loss on the tuning seed, of those that were run."""
    finals = {
        key[2]: r["final"] for key, r in runs.items() if key[:2] + key[3:4] == (task, rival, "tune")
    }
    return min(finals, key=finals.__getitem__)  # type: ignore[arg-type, return-value]


def table(runs: dict[Key, dict[str, Any]]) -> None:
    """Prints final losses over those of each rival: by task, and their geometric means."""
    field = json.loads(FIELD.read_text())["tasks"]
    found: dict[str, list[float]] = defaultdict(list)

    def mean(task: str, optimizer: str, figure: str = "final") -> float | None:
        own = [r for k, r in runs.items() if k[:2] == (task, optimizer) and k[3] == "test"]
        values = [r["final"] if figure == "final" else r["test"].get("loss") for r in own]
        return (
            sum(values) / len(values) if len(values) == len(SEEDS) and None not in values else None
        )

    for task in field:
        ours, held = mean(task, "eigenbasis"), mean(task, "eigenbasis", "held out")
        adamw = field[task]["optimizers"]["adamw-cosine"]
        rivals = {
            "adamw": (ours, adamw["final"]["mean"]),
            "adamw held out": (held, adamw["test"].get("loss", {}).get("mean")),
            **{rival: (ours, mean(task, rival)) for rival in RIVALS},
        }
        ratios = {k: a / b for k, (a, b) in rivals.items() if a is not None and b is not None}
        for name, ratio in ratios.items():
            found[name].append(min(max(ratio, 0.1), 10.0))
        print(f"{task:24}", *(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    generator = torch.Generator().manual_seed(0)
    for name, ratios in found.items():
        logs = torch.tensor(ratios).log()
        drawn = logs[torch.randint(len(logs), (10_000, len(logs)), generator=generator)].mean(1)
        low, high = drawn.quantile(torch.tensor([0.025, 0.975])).exp().tolist()
        ahead = int((logs < 0).sum())
        print(
            f"{name}: {logs.mean().exp():.2f} [{low:.2f}, {high:.2f}], median "
            f"{logs.median().exp():.2f}, ahead on {ahead} of {len(ratios)}"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="0 only prints the table")


def run(options: argparse.Namespace) -> None:
    """Makes missing runs, and prints the table."""
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    runs = read()
    wanted: list[Any] = [
        (task, "eigenbasis", None, "test", s) for task in field_tasks() for s in SEEDS
    ]
    wanted += [
        (task, rival, lr, "tune", 0) for task in field_tasks() for rival in RIVALS for lr in RATES
    ]
    wanted += [
        (task, rival, None, "test", s) for task in field_tasks() for rival in RIVALS for s in SEEDS
    ]
    for task, optimizer, lr, phase, seed in wanted:
        if time.monotonic() >= end:
            break
        rate = tuned(runs, task, optimizer) if optimizer in RIVALS and phase == "test" else lr
        finish(runs, (task, optimizer, rate, phase, seed))
    table(runs)
