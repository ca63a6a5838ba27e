"""Inner steps per second and peak memory of meta-training, by the size of the optimizee.

Perceptrons of 16 thousand, 300 thousand and 5 million parameters on batches of random numbers, so
that no data is needed. Every figure is of a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.measure import in_child, peak_memory
from learned_optim.meta import (
    ESTIMATORS,
    DataOptions,
    EstimatorOptions,
    EvolutionRecipe,
    FixedTask,
    ModuleTask,
    Optimizees,
    Recipe,
    load_recipe,
)
from learned_optim.meta.evolution_jobs import TaskJob, run_task
from learned_optim.meta.evolution_tasks import RunSource, given_family
from learned_optim.meta.evolution_weights import initial_weights
from learned_optim.meta.seeding import seeded
from learned_optim.rules import rule_for
from learned_optim.summary import table

#: Layers by size.
SIZES = {
    "16 thousand": (784, 20, 10),
    "300 thousand": (784, 300, 200, 10),
    "5 million": (784, 2000, 1700, 10),
}
BATCH, STEPS = 128, 20
#: Recipes by what the table calls them: the rule, the estimator and its options are theirs.
METHODS = {
    "replay, a network per tensor (`quick`)": "quick",
    "replay, one per coordinate, 1,000 sampled (`mnist`)": "mnist",
    "evolution strategies, 8 runs side by side (`quick-evolution`)": "quick-evolution",
}


def perceptron(layers: tuple[int, ...]) -> FixedTask:
    """The task of training a perceptron with these layers."""

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(layers):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    def batches(generator: Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(BATCH, layers[0], generator=generator)
        return inputs, torch.randint(layers[-1], (BATCH,), generator=generator)

    return FixedTask(ModuleTask(build, batches, nn.functional.cross_entropy))


def cost(method: str, size: str) -> dict[str, float]:
    """Of one unroll, or whole run, of 20 inner steps.

    Returns:
        ``rate``, inner steps of all optimizees per second of processor time; ``peak``, bytes by
        which the process grew; ``parameters`` of an optimizee.
    """
    torch.set_num_threads(1)
    family, recipe = perceptron(SIZES[size]), load_recipe(METHODS[method])
    if isinstance(recipe, Recipe):
        run, optimizees = _replay(recipe, family), 1
    else:
        run, optimizees = _evolution(recipe, family), 2 * recipe.pairs
    run(2)
    started = time.process_time()
    peak = peak_memory(lambda: run(STEPS))
    rate = STEPS * optimizees / (time.process_time() - started)
    parameters = sum(p.numel() for p in family.task.init(Generator()).values())
    return {"rate": rate, "peak": peak, "parameters": parameters}


def _replay(recipe: Recipe, family: FixedTask) -> Callable[[int], None]:
    rule, options = rule_for(recipe.rule), EstimatorOptions(recipe.coordinates, seeded("sample"))

    def run(steps: int) -> None:
        generator = seeded("optimizee")
        optimizees = Optimizees(rule, [family.sample(generator)], [generator])
        ESTIMATORS[recipe.estimator](rule, optimizees, steps, options)

    return run


def _evolution(recipe: EvolutionRecipe, family: FixedTask) -> Callable[[int], None]:
    weights = initial_weights(rule_for(recipe.rule), recipe.seed, recipe.start)

    def run(steps: int) -> None:
        source = RunSource("meta_train:perceptron", steps, 1, DataOptions())
        with given_family(family):
            result = run_task(TaskJob(0, weights, recipe, source))
        assert result.fitness is not None, result.error

    return run


def measure() -> dict[str, Any]:
    """Every method on every size, each in a process of its own."""
    found: dict[str, Any] = {}
    for size in SIZES:
        for method in METHODS:
            row = in_child("benchmarks.meta_training_sizes:cost", method, size)
            found.setdefault(size, {})[method] = row
            print(f"  {size}, {method}: {row}", flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table, a row per method and size."""
    rows = [
        [
            method if index == 0 else "",
            f"{by_method[method]['parameters']:,}",
            _rounded(by_method[method]["rate"]),
            f"{by_method[method]['peak'] / 2**20:,.0f}",
        ]
        for method in METHODS
        for index, by_method in enumerate(found.values())
    ]
    head = ["", "parameters", "inner steps per processor second", "peak memory, MiB"]
    return table(head, rows)


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
