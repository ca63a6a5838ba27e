"""Short trainings on bundled data, watched step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.meta.tasks import ModuleTask, Task, TaskOptions, build_tasks
from learned_optim.rules import UpdateRule

WATCHED_STEPS = 300
ADAM_LRS = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Watched:
    """A run: losses before every step; diagnostics of every step by tensor."""

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


def watch(task: Task, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Watched:
    """Train a task, recording losses and the diagnostics of a learned optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    optimizer = make(list(params.values()))
    if isinstance(optimizer, LearnedOptimizer):
        optimizer.diagnose()
    run = Watched([], {name: [] for name in params})
    for _ in range(WATCHED_STEPS):
        loss = task.loss(params, task.batch(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
        run.losses.append(float(loss.detach()))
        found = optimizer.diagnostics() if isinstance(optimizer, LearnedOptimizer) else {}
        for index, name in enumerate(params):
            if f"0/{index}" in found:
                run.numbers[name].append(found[f"0/{index}"])
    return run


def watch_digits(rule: UpdateRule) -> dict[str, Watched]:
    """The digits classifier by the rule, with and without ``total_steps``, and by Adam."""
    makers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {}
    if rule.reads_horizon:
        makers["with total_steps"] = partial(LearnedOptimizer, rule=rule, total_steps=WATCHED_STEPS)
    makers["without total_steps"] = partial(LearnedOptimizer, rule=rule)
    makers |= {f"Adam {lr:g}": partial(torch.optim.Adam, lr=lr) for lr in ADAM_LRS}
    task = digits_classifier()
    return {label: watch(task, make) for label, make in makers.items()}
