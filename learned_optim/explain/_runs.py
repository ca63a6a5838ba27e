"""Short trainings on bundled data, watched step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations import Population, draw
from learned_optim.meta.tasks import ModuleTask, Task, TaskOptions, build_tasks
from learned_optim.rules import UpdateRule

#: Steps of the watched run, and of the quick ones by which rules are compared.
WATCHED_STEPS, QUICK_STEPS = 300, 150
#: Tasks of the quick runs: bundled or made up, so that nothing is downloaded.
QUICK_TASKS = ("digits-torch", "regression", "quadratic")
#: Learning rates of Adam beside the watched run.
ADAM_LRS = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Watched:
    """A run with the optimizer's diagnostics.

    Attributes:
        losses: of every batch before its step.
        numbers: of every step by tensor, as :meth:`learned_optim.LearnedOptimizer.diagnostics`
            returns them.
        final: mean loss of the last tenth.
    """

    losses: list[float]
    numbers: dict[str, list[dict[str, float]]]

    @property
    def final(self) -> float:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def digits_classifier() -> Task:
    """A 64-32-32-10 ReLU network on scikit-learn's digits, batches of 64."""
    digits = build_tasks("digits-torch", TaskOptions()).sample(torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    def batches(generator: torch.Generator) -> tuple[Tensor, ...]:
        images, labels = digits.batch(generator)
        return images[:64], labels[:64]

    return ModuleTask(build, batches)


def watch(
    task: Task,
    optimizer: Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer],
    steps: int,
    seed: int = 0,
) -> Watched:
    """Train and record; diagnostics of optimizers that have any."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    own = optimizer(list(params.items()))
    if isinstance(own, LearnedOptimizer):
        own.diagnose()
    losses: list[float] = []
    numbers: dict[str, list[dict[str, float]]] = {name: [] for name in params}
    for _ in range(steps):
        loss = task.loss(params, task.batch(generator))
        own.zero_grad()
        loss.backward()
        own.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
        losses.append(float(loss.detach()))
        if isinstance(own, LearnedOptimizer):
            found = own.diagnostics()
            for index, name in enumerate(params):
                if f"0/{index}" in found:
                    numbers[name].append(found[f"0/{index}"])
    return Watched(losses, numbers)


def watch_digits(rule: UpdateRule, seed: int = 0) -> dict[str, Watched]:
    """The digits classifier by the rule, told its length and not, and by Adam."""
    task, steps = digits_classifier(), WATCHED_STEPS
    lengths: dict[str, int | None] = {"with total_steps": steps} if rule.reads_horizon else {}
    lengths["without total_steps"] = None
    found = {
        label: watch(task, _learned(rule, length), steps, seed) for label, length in lengths.items()
    }
    for lr in ADAM_LRS:
        found[f"Adam {lr:g}"] = watch(task, _adam(lr), steps, seed)
    return found


def _learned(
    rule: UpdateRule, total_steps: int | None
) -> Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer]:
    return lambda named: LearnedOptimizer(
        [p for _, p in named], copy.deepcopy(rule), total_steps=total_steps
    )


def _adam(lr: float) -> Callable[[list[tuple[str, Tensor]]], torch.optim.Optimizer]:
    return lambda named: torch.optim.Adam([p for _, p in named], lr=lr)


@dataclass(frozen=True)
class Trial:
    """A training to be done, the same for every rule.

    Attributes:
        name: what is trained.
        task: the optimizee.
        steps: length of the run.
        known: whether rules that read it are told the length.
        seed: of the initial parameters and the batches.
    """

    name: str
    task: Task
    steps: int
    known: bool
    seed: int

    def train(
        self, rule: UpdateRule, prepare: Callable[[LearnedOptimizer], None] = lambda _: None
    ) -> list[float]:
        """Train by a rule and return the loss before every step.

        Args:
            rule: is copied.
            prepare: is shown the optimizer before its first step.
        """
        generator = torch.Generator().manual_seed(self.seed)
        params = {n: p.requires_grad_() for n, p in self.task.init(generator).items()}
        total = self.steps if self.known and rule.reads_horizon else None
        optimizer = LearnedOptimizer(list(params.values()), rule, total_steps=total)
        prepare(optimizer)
        losses = []
        for _ in range(self.steps):
            loss = self.task.loss(params, self.task.batch(generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
            losses.append(float(loss.detach()))
        return losses

    def log_final(self, rule: UpdateRule) -> float:
        """Log of the mean loss of the last tenth of the steps, at most that of a million."""
        losses = self.train(rule)
        tail = losses[-max(1, len(losses) // 10) :]
        final = abs(sum(tail) / len(tail))
        return math.log(min(final + 1e-12, 1e6) if math.isfinite(final) else 1e6)


def quick_trials(seeds: int = 2, steps: int = QUICK_STEPS) -> list[Trial]:
    """Digits, a regression and quadratics."""
    trials = []
    for name in QUICK_TASKS:
        family = build_tasks(name, TaskOptions())
        for seed in range(seeds):
            task = family.sample(torch.Generator().manual_seed(100 + seed))
            trials.append(Trial(f"{name} {seed}", task, steps, True, seed))
    return trials


class _OneCopy(Task):
    """A population of one, as a task."""

    def __init__(self, population: Population) -> None:
        self._population = population

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return self._population.initial(generator)

    def batch(self, generator: torch.Generator) -> tuple[Any, ...]:
        return self._population.batch(generator)

    def loss(self, params: dict[str, Tensor], batch: tuple[Any, ...]) -> Tensor:
        copies = {name: value.unsqueeze(0) for name, value in params.items()}
        return self._population.losses(copies, batch)[0]


def population_trials(count: int, first_seed: int, longest: int = WATCHED_STEPS) -> list[Trial]:
    """Runs of the mixture that the rule ``horizon`` is meta-trained on, cut off at ``longest``.

    Draws that need MNIST are left out where it is not found.
    """
    trials: list[Trial] = []
    for seed in range(first_seed, first_seed + 20 * count):
        if len(trials) == count:
            break
        try:
            run = draw(seed, DataOptions(download=False))
        except FileNotFoundError:
            continue
        steps = min(run.steps, longest)
        trials.append(Trial(run.task.name, _OneCopy(run.task), steps, run.known, seed))
    return trials
