"""Target 5: meta-training by the thesis's recipe, against direct backpropagation, and batched."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_child, peak_memory
from benchmarks.plain import PlainNetwork, plain_unroll
from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    MetaTrainer,
    Optimizees,
    build_tasks,
    load_recipe,
)
from learned_optim.meta.seeding import seeded
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

#: Optimizees side by side in the batched mode.
TOGETHER = 32
#: Small optimizees, and the rule that meets them: the shipped recipes' for each.
SMALL = {
    "quadratic": LSTMConfig(preprocessing="raw", output_scale=1.0),
    "digits": LSTMConfig(),
}


def plain_run(runs: int) -> tuple[float, int]:
    """Seconds and peak bytes of optimizee runs of the thesis's recipe, written directly."""
    recipe = load_recipe("mnist")
    torch.manual_seed(recipe.seed)
    rule = LSTMRule(recipe.rule)
    network, family = PlainNetwork(rule), build_tasks(recipe.task)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.meta_lr)

    def run() -> None:
        for index in range(runs):
            generator = seeded(recipe.seed, "train", 1, index, 0)
            task = family.sample(generator)
            params = list(task.init(generator).values())
            states = [network.start(param.numel()) for param in params]
            for _ in range(recipe.horizon // recipe.truncation):
                _, grads, params, states = plain_unroll(
                    network, params, states, partial(task.batch, generator), recipe.truncation
                )
                for weight, grad in zip(network.parameters(), grads, strict=True):
                    weight.grad = grad
                optimizer.step()

    return _timed(run)


def package_run(runs: int, coordinates: int | None) -> tuple[float, int]:
    """The same with the meta-trainer; every coordinate replayed, or a sample of them."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(load_recipe("mnist"), coordinates=coordinates)
        trainer = MetaTrainer(recipe, Path(folder))

        def run() -> None:
            for index in range(runs):
                trainer._train_run(1, index)

        return _timed(run)


def _timed(run: Callable[[], None]) -> tuple[float, int]:
    """Processor seconds, and bytes by which the process grew; the first run is a warm-up."""
    run()
    started = time.process_time()
    peak = peak_memory(run)
    return time.process_time() - started, peak


def unrolls_per_second(task: str, together: int, seconds: float) -> float:
    """Optimizee-steps per processor second of meta-training with ``together`` at once."""
    rule, family, estimate = LSTMRule(SMALL[task]), build_tasks(task), ESTIMATORS["replay"]
    best = 0.0
    until = time.process_time() + seconds
    rounds = 0
    while time.process_time() < until or rounds < 2:
        generators = [seeded("batched", together, rounds, i) for i in range(together)]
        optimizees = Optimizees(rule, [family.sample(g) for g in generators], generators)
        started = time.process_time()
        for _ in range(5):
            estimate(rule, optimizees, 20, EstimatorOptions(1000))
        best = max(best, 100 * together / (time.process_time() - started))
        rounds += 1
    return best


def measure() -> dict[str, Any]:
    """Everything in processes of their own, in turns; the better of two."""
    subjects = {
        "plain": ("benchmarks.meta_training:plain_run", 1),
        "replay, all coordinates": ("benchmarks.meta_training:package_run", 1, None),
        "replay, 1,000 coordinates": ("benchmarks.meta_training:package_run", 1, 1000),
    }
    found: dict[str, Any] = {}
    for _ in range(2):
        for name, (function, *arguments) in subjects.items():
            seconds, peak = in_child(function, *arguments)
            old = found.get(name, {"seconds": float("inf"), "peak": 0})
            found[name] = {
                "seconds": round(min(old["seconds"], seconds), 2),
                "peak": max(old["peak"], peak),
            }
            print(f"  {name}: {seconds:.1f} s, {peak / 2**20:.0f} MiB", flush=True)
    batched = {}
    for task in SMALL:
        rates = {str(b): round(unrolls_per_second(task, b, 3.0)) for b in (1, TOGETHER)}
        batched[task] = rates
        print(f"  {task}: {rates}", flush=True)
    return {"runs": found, "batched": batched, "together": TOGETHER}
