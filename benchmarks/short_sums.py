"""The summed loss of short runs, which the default is not made for: what would lower it.

    python -m benchmarks.short_sums    # two minutes on one core; $LEARNED_OPTIM_DATA

The thesis's network on MNIST's meta half, in its initialization and in PyTorch's own, for 100 and
200 steps: the default told their number, with longer steps, with a trust that grows faster or
starts higher, told twice their number, and not told any. Figures are summed losses over those of
Adam at the best of seven constant rates, means over eight seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from benchmarks import no_options
from benchmarks.own_decay import rule_with
from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks import Params, TaskOptions, build_tasks
from learned_optim.summary import table

SEEDS = 8
ADAM_LRS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
Make = Callable[[Sequence[Tensor], int], Optimizer]


def learned(lr: float = 1.0, told: float | None = 1.0, **config: Any) -> Make:
    """The default under another configuration; ``told`` is the share of the true length."""

    def make(params: Sequence[Tensor], steps: int) -> Optimizer:
        total = None if told is None else int(told * steps)
        return LearnedOptimizer(params, rule_with("default", **config), lr=lr, total_steps=total)

    return make


KINDS = {
    "as it is": learned(),
    "lr=1.5": learned(lr=1.5),
    "lr=2": learned(lr=2.0),
    "trust_gain=3": learned(trust_gain=3.0),
    "trust_start=-1": learned(trust_start=-1.0),
    "trust_gain=3, lr=2": learned(lr=2.0, trust_gain=3.0),
    "told twice the length": learned(told=2.0),
    "not told": learned(told=None),
}


def summed(name: str, make: Make, steps: int, seed: int) -> float:
    """Sum of the losses of one run."""
    task = build_tasks(name, TaskOptions("meta", DataOptions())).sample(Generator())
    generator, total = Generator().manual_seed(seed), 0.0
    params: Params = {n: torch.nn.Parameter(p) for n, p in task.init(generator).items()}
    optimizer = make(list(params.values()), steps)
    for _ in range(steps):
        loss = task.loss(params, task.batch(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


def adam(lr: float) -> Make:
    """Adam at a constant rate."""
    return lambda params, steps: torch.optim.Adam(params, lr)


def main() -> None:
    """Print the table."""

    def mean(name: str, make: Make, steps: int) -> float:
        return sum(summed(name, make, steps, seed) for seed in range(SEEDS)) / SEEDS

    columns = [(name, steps) for name in ("mnist", "mnist-torch") for steps in (100, 200)]
    best = [min(mean(name, adam(lr), steps) for lr in ADAM_LRS) for name, steps in columns]
    rows = []
    for label, make in KINDS.items():
        sums = [mean(name, make, steps) for name, steps in columns]
        rows.append([label, *(f"{s / b:.2f}" for s, b in zip(sums, best, strict=True))])
    print(table(["default", *(f"`{name}`, {steps}" for name, steps in columns)], rows))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
