"""Seconds, not steps: when the learned optimizers reach the loss that tuned Adam has at step 200.

    python -m benchmarks.wall_clock        # some minutes; needs $LEARNED_OPTIM_DATA

Per seed, every optimizer trains the same network from the same weights on the same batches, one
after another, so that all of them see the machine in the same state. Adam's learning rate is the
one tuned for the task (docs/results/). Losses are means over seeds and ten steps; seconds count
forward, backward and step on one thread. Writes docs/performance/wall_clock.json and .png.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import no_options
from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import TaskOptions, build_tasks
from learned_optim.summary import table

DOCS = Path(__file__).parent.parent / "docs"
TASKS = {"mnist": "thesis", "mnist-40": "thesis", "fashion": "thesis", "mnist-cnn": "convnets"}
SEEDS, STEPS, SMOOTH = 5, 200, 10
ADAM = "adam"  # whose final loss is the goal


def optimizers(lr: float) -> dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]]:
    """Everybody who runs, by name."""
    return {
        ADAM: lambda params: torch.optim.Adam(params, lr=lr, foreach=False),
        "adam, foreach": lambda params: torch.optim.Adam(params, lr=lr, foreach=True),
        "adam, fused": lambda params: torch.optim.Adam(params, lr=lr, fused=True),
        "default": lambda params: LearnedOptimizer(params, total_steps=STEPS),
        "coordinatewise": lambda params: LearnedOptimizer(params, "coordinatewise", warmup=0),
    }


def train(
    benchmark: str,
    task_name: str,
    seed: int,
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
) -> tuple[list[float], list[float]]:
    """Losses, and seconds of every step; each benchmark draws weights and batches of its own."""
    generator = seeded(benchmark, task_name, seed)
    family = build_tasks(task_name, TaskOptions("evaluation", DataOptions()))
    task = family.sample(generator)
    params = {n: torch.nn.Parameter(p) for n, p in task.init(generator).items()}
    optimizer = make(params.values())
    losses, seconds = [], []
    for _ in range(STEPS):
        batch = task.batch(generator)
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss(params, batch)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return losses, seconds


def measure() -> dict[str, Any]:
    """Per task: the goal, and every optimizer's curve over steps and seconds."""
    torch.set_num_threads(1)
    found = {}
    for task, group in TASKS.items():
        summary = json.loads((DOCS / "results" / f"{group}.json").read_text())
        lr = summary["tasks"][task]["horizons"][str(STEPS)]["optimizers"][ADAM]["lr"]
        runs: dict[str, list[tuple[list[float], list[float]]]] = {}
        for seed in range(-1, SEEDS):  # the first is a warm-up
            for name, make in optimizers(lr).items():
                result = train("wall clock", task, seed, make)
                if seed >= 0:
                    runs.setdefault(name, []).append(result)
        rows = {name: _curves(each) for name, each in runs.items()}
        goal = rows[ADAM]["loss"][-1]
        for row in rows.values():
            steps = next((i for i, x in enumerate(row["loss"]) if x <= goal), None)
            row["steps_to_goal"] = None if steps is None else steps + SMOOTH
            row["seconds_to_goal"] = None if steps is None else row["seconds"][steps]
        found[task] = {"adam_lr": lr, "goal": goal, "optimizers": rows}
        print(markdown({"tasks": {task: found[task]}}), flush=True)
    return {"seeds": SEEDS, "steps": STEPS, "tasks": found}


def _curves(runs: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Mean over seeds of the running mean of ten losses, beside the seconds until then.

    Seconds are medians over seeds of each step, summed: a machine's hiccup is nobody's property.
    """
    losses = [statistics.mean(step) for step in zip(*(r[0] for r in runs), strict=True)]
    seconds = [statistics.median(step) for step in zip(*(r[1] for r in runs), strict=True)]
    smooth = [statistics.mean(losses[i : i + SMOOTH]) for i in range(len(losses) - SMOOTH + 1)]
    elapsed = list(itertools.accumulate(seconds))[SMOOTH - 1 :]
    return {
        "loss": [round(x, 4) for x in smooth],
        "seconds": [round(x, 5) for x in elapsed],
        "milliseconds_per_step": round(1e3 * statistics.median(seconds), 4),
    }


def markdown(found: dict[str, Any]) -> str:
    """Seconds and steps to the goal; seconds in units of plain Adam's."""
    head = ["task", "loss to reach", "optimizer", "ms per step", "steps", "seconds", "of Adam's"]
    rows = []
    for task, entry in found["tasks"].items():
        base = entry["optimizers"][ADAM]["seconds_to_goal"]
        for name, row in entry["optimizers"].items():
            reached = row["seconds_to_goal"] is not None
            rows.append(
                [
                    task,
                    f"{entry['goal']:.3f}",
                    name,
                    f"{row['milliseconds_per_step']:.2f}",
                    str(row["steps_to_goal"]) if reached else "never",
                    f"{row['seconds_to_goal']:.3f}" if reached else "",
                    f"{row['seconds_to_goal'] / base:.2f}" if reached else "",
                ]
            )
    return table(head, rows)


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss against seconds, a panel per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (task, entry) in zip(panels, found["tasks"].items(), strict=True):
        for name, row in entry["optimizers"].items():
            learned = not name.startswith(ADAM)
            axes.plot(row["seconds"], row["loss"], "-" if learned else "--", label=name)
        axes.axhline(entry["goal"], color="grey", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlim(0, 1.5 * entry["optimizers"][ADAM]["seconds"][-1])
        axes.set_xlabel("seconds")
        axes.set_ylabel("training loss")
        axes.set_title(f"{task} (Adam: lr {entry['adam_lr']:g}, tuned)")
        axes.grid(True, alpha=0.2)
        axes.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    no_options.parse(__doc__)
    result = measure()
    folder = DOCS / "performance"
    draw(result, folder / "wall_clock.png")
    (folder / "wall_clock.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
