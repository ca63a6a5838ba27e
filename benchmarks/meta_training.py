"""Inner steps per second of meta-training, by recipe and size of the trained network.

    python -m benchmarks meta-training    # some minutes; writes docs/performance/meta-training.json

The networks are perceptrons on random numbers, so that no data is needed. A rate is the difference
of two trainings of different length, so that validation and the tuning of AdamW do not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.common import PERFORMANCE, machine, save
from learned_optim.meta import ModuleTask, meta_train
from learned_optim.summary import table

OUTPUT = PERFORMANCE / "meta-training.json"
BATCH, HORIZON = 128, 20
#: Layers by number of parameters.
SIZES = {"16 thousand": (784, 20, 10), "300 thousand": (784, 300, 200, 10)}
#: Recipes, what they are, and the options that give a training of ``n`` units.
GRADIENT = {"validation_runs": 2, "epochs": 1, "against_adamw": False}
EVOLUTION = {"validation_tasks": 1, "tasks_per_meta_step": 1}
PAIRS = 4
RECIPES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "quick": ("backpropagation, a network per tensor", lambda n: {**GRADIENT, "runs_per_epoch": n}),
    "mnist": ("backpropagation, an LSTM per coordinate",
              lambda n: {**GRADIENT, "runs_per_epoch": n}),
    "quick-evolution": (f"evolution strategies, {2 * PAIRS} copies",
                        lambda n: {**EVOLUTION, "pairs": PAIRS, "meta_steps": n}),
}  # fmt: skip


def perceptron(layers: tuple[int, ...]) -> ModuleTask:
    """Returns the task of training a perceptron with these layers on random numbers."""

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(layers):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    def batches(generator: Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(BATCH, layers[0], generator=generator)
        return inputs, torch.randint(layers[-1], (BATCH,), generator=generator)

    return ModuleTask(build, batches, nn.functional.cross_entropy)


def seconds(recipe: str, layers: tuple[int, ...], changes: dict[str, Any]) -> float:
    """Returns the processor seconds of one training."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        meta_train(
            perceptron(layers), recipe, folder=folder, progress=False, horizon=HORIZON, **changes
        )
        return time.process_time() - started


def rate(recipe: str, layers: tuple[int, ...], units: tuple[int, int]) -> float:
    """Returns inner steps of all trained networks per processor second."""
    _, changes = RECIPES[recipe]
    short, long = (seconds(recipe, layers, changes(count)) for count in units)
    runs = (units[1] - units[0]) * (2 * PAIRS if "pairs" in changes(1) else 1)
    return HORIZON * runs / (long - short)


def measure() -> dict[str, Any]:
    """Returns the rates of all recipes and sizes."""
    found: dict[str, Any] = {"machine": machine(), "rates": {}}
    for recipe in RECIPES:
        found["rates"][recipe] = {}
        for size, layers in SIZES.items():
            found["rates"][recipe][size] = rate(recipe, layers, (2, 8))
            print(f"  {recipe}, {size}: {found['rates'][recipe][size]:.2f}", flush=True)
    return found


def rate_table(found: dict[str, Any]) -> str:
    """Returns the table, Markdown."""
    rows = [
        [f"`{recipe}`: {RECIPES[recipe][0]}", *(f"{rates[size]:,.0f}" for size in SIZES)]
        for recipe, rates in found["rates"].items()
    ]
    return table(["inner steps per processor second", *SIZES], rows)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(rate_table(save(OUTPUT, measure())))
