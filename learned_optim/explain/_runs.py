"""Short trainings on bundled data, watched step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.meta.tasks import ModuleTask, Task, TaskOptions, build_tasks
from learned_optim.rules import UpdateRule

#: Steps of the watched run.
WATCHED_STEPS = 300
#: Learning rates of Adam beside the watched run.
ADAM_LRS = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Watched:
    """A run: the loss before every step, and the diagnostics of every step by tensor."""

    losses: list[float]
    numbers: dict[str, list[dict[str, float]]]

    @property
    def final(self) -> float:
        """Mean loss of the last tenth."""
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
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    seed: int = 0,
) -> Watched:
    """Train a task, recording losses and the diagnostics of a learned optimizer."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    own = optimizer(list(params.values()))
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
    """The digits classifier by the rule, with and without its length, and by Adam."""
    task, steps = digits_classifier(), WATCHED_STEPS
    lengths: dict[str, int | None] = {"with total_steps": steps} if rule.reads_horizon else {}
    lengths["without total_steps"] = None
    makers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        label: lambda params, length=length: LearnedOptimizer(  # type: ignore[misc]
            params, copy.deepcopy(rule), total_steps=length
        )
        for label, length in lengths.items()
    }
    for lr in ADAM_LRS:
        makers[f"Adam {lr:g}"] = lambda params, lr=lr: torch.optim.Adam(params, lr)  # type: ignore[misc]
    return {label: watch(task, make, steps, seed) for label, make in makers.items()}
