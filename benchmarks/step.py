"""Time of one optimizer step beside Adam's fused step.

python -m benchmarks step            # a minute; writes docs/performance/step.json
python -m benchmarks step --quick    # the small network alone, in seconds; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import PERFORMANCE, ROOT, best_seconds, machine, parameters, save, shipped
from learned_optim import LearnedOptimizer, kernels, load_rule
from learned_optim.pretrained import ALIASES
from learned_optim.summary import table

OUTPUT = PERFORMANCE / "step.json"
MILLION = 10**6
SMALL = "784-20-10 network"
TOTAL_STEPS = 100_000


def mixed_shapes() -> list[tuple[int, ...]]:
    """Returns 66 shapes: a small convolutional trunk with two transformer blocks."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    for inputs, width in ((64, 64), (64, 64), (64, 128), (128, 128), (128, 128)):
        shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3)]
        shapes += [(width,), (width,)]
    for _ in range(2):
        shapes += [(128,), (128,), (384, 128), (384,), (128, 128), (128,), (128,), (128,)]
        shapes += [(512, 128), (512,), (128, 512), (128,)]
    shapes += [(500, 128), (128,), (128,), (64, 128), (64,), (10, 128), (10,), (128, 64), (1,)]
    return shapes


#: Shapes, and the rounds of which the fastest counts.
NETWORKS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    SMALL: ([(20, 784), (20,), (10, 20), (10,)], 1000),
    "66 mixed tensors": (mixed_shapes(), 60),
    "one tensor, 1M": ([(1000, 1000)], 30),
    "one tensor, 10M": ([(2500, 4000)], 3),
}


def step_of(name: str, shapes: list[tuple[int, ...]]) -> Callable[[], Any]:
    """Returns the step of ``"adam"`` or of a checkpoint, with parameters of its own.

    A checkpoint is told the length of the run if its rule reads it.
    """
    params = parameters(shapes)
    if name == "adam":
        return torch.optim.Adam(params, fused=True).step
    rule = load_rule(name)
    total_steps = TOTAL_STEPS if rule.reads_horizon else None
    return LearnedOptimizer(params, rule, total_steps=total_steps).step


def times(networks: list[str], names: list[str], threads: int = 1) -> list[dict[str, Any]]:
    """Returns seconds per step of Adam and of checkpoints, a row per network."""
    rows = []
    for network in networks:
        shapes, rounds = NETWORKS[network]
        steps = {name: step_of(name, shapes) for name in ("adam", *names)}
        best = best_seconds(steps, rounds, threads)
        rows.append({"network": network, "threads": threads, **best})
        print(f"  {network}, {threads} thread(s)", file=sys.stderr, flush=True)
    return rows


def pure_times(names: list[str]) -> list[dict[str, Any]]:
    """Returns the same in a process whose kernels are switched off."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "step", "--json", *names],
        cwd=ROOT,
        env={**os.environ, "LEARNED_OPTIM_KERNELS": "0", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def graph_times(name: str) -> dict[str, float]:
    """Returns seconds per step of the small network, eager and under ``torch.compile``."""
    steps = {subject: step_of(name, NETWORKS[SMALL][0]) for subject in ("eager", "compiled")}
    steps["compiled"] = torch.compile(steps["compiled"], fullgraph=True)
    for step in steps.values():  # makes the state, traces
        step()
        step()
    return best_seconds(steps, 300)


def checkpoint_times() -> dict[str, Any]:
    """Returns nanoseconds per parameter of every checkpoint on a matrix of a million."""
    steps = {name: step_of(name, [(1000, 1000)]) for name in ("adam", *shipped())}
    return {name: 1e9 * s / MILLION for name, s in best_seconds(steps, 4).items()}


def measure() -> dict[str, Any]:
    """Returns all figures of the page."""
    names = [ALIASES["default"], ALIASES["default-fast"]]
    idle = os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1)
    rows = times(list(NETWORKS), names)
    if idle:  # on a busy machine two threads wait for each other
        rows += times(list(NETWORKS), names, threads=2)
    return {
        "machine": machine(),
        "kernel": kernels.status().partition(":")[0],
        "rows": rows,
        "pure": pure_times(names),
        "graph": graph_times(names[0]),
        "checkpoints": checkpoint_times(),
    }


def step_table(found: dict[str, Any]) -> str:
    """Returns the table of steps, Markdown."""
    names = [key for key in found["rows"][0] if key not in ("network", "threads", "adam")]
    pure = {(row["network"], 1): row for row in found["pure"]}
    rows = []
    for row in found["rows"]:
        without = pure.get((row["network"], row["threads"]))
        cells = [row["network"], str(row["threads"]), f"{1e6 * row['adam']:,.0f}"]
        for name in names:
            cells.append(f"{row[name] / row['adam']:.2f}")
            cells.append(f"{without[name] / without['adam']:.0f}" if without else "")
        rows.append(cells)
    head = ["", "threads", "Adam, µs"]
    for name in names:
        head += [f"`{name}` / Adam", "without kernel"]
    return table(head, rows)


def checkpoint_table(found: dict[str, Any]) -> str:
    """Returns the table of checkpoints, Markdown."""
    adam = found["checkpoints"]["adam"]
    rows = [
        ["Adam, fused" if name == "adam" else f"`{name}`", f"{ns:.1f}", f"{ns / adam:.1f}"]
        for name, ns in found["checkpoints"].items()
    ]
    return table(["", "ns per parameter", "of Adam's"], rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="only the small network")
    parser.add_argument("--json", nargs="+", metavar="NAME", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.json:
        print(json.dumps(times(list(NETWORKS)[:3], options.json)))
    elif options.quick:
        for row in times([SMALL], shipped()):
            print({name: round(row[name] / row["adam"], 2) for name in shipped()}, "x Adam, fused")
    else:
        found = save(OUTPUT, measure())
        print(step_table(found), checkpoint_table(found), found["graph"], sep="\n\n")
