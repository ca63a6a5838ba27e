"""Where steps overshoot, and where they only seem to: the trust of checkpoints told the length.

    python -m benchmarks.overshooting    # five minutes on one core

Boundary value problems of the meta-training mixture, 3,000 steps, in which gradients contradict the
momentum while they shrink; and networks of sines on random waves in the plane, which too long steps
keep from training at all. No weight decay. Final losses, over the last twentieth of a run, are in
units of the first one; the last row has geometric means over that of `general-5`, whose trust never
falls where the length is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Generator, Tensor

from benchmarks import no_options
from benchmarks.own_decay import LARGEST_BATCH, samplers
from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._mixture import run_generators
from learned_optim.meta.populations.boundary import BoundaryValue
from learned_optim.meta.tasks.coordinates import sine_network
from learned_optim.summary import table

CHECKPOINTS = ("general-5", "general-6", "general-7")
STEPS, PROBLEMS, WAVES = 3000, 8, 12
#: Width of the networks of sines, their batch, and the length of their runs; two seeds of each.
SINES = ((64, 128, 3000), (48, 96, 3000), (96, 128, 2000))

#: Name, parameters, loss of a new batch, and the length of the run.
Problem = tuple[str, dict[str, Tensor], Callable[[], Tensor], int]


def boundary(seed: int) -> Problem:
    """A boundary value problem with small batches."""
    drawn = (BoundaryValue(sampler, DataOptions()) for sampler in samplers(seed))
    task = next(task for task in drawn if task.batch_size <= LARGEST_BATCH)
    generator, _ = run_generators(seed)
    params = {name: value.clone() for name, value in task.initial(generator).items()}

    def loss() -> Tensor:
        stacked = {name: value.unsqueeze(0) for name, value in params.items()}
        return task.losses(stacked, task.batch(generator)).sum()

    return task.name, params, loss, STEPS


def sines(width: int, batch: int, steps: int, seed: int) -> Problem:
    """A network of sines that fits the mean of twelve waves."""
    torch.manual_seed(seed)
    model = sine_network(inputs=2, outputs=1, width=width)
    generator = Generator().manual_seed(1)
    waves = 8 * torch.randn(WAVES, 2, generator=generator)
    phases = torch.randn(WAVES, generator=generator)

    def loss() -> Tensor:
        x = 2 * torch.rand(batch, 2, generator=generator) - 1
        wanted = 2 * (x @ waves.T + phases).sin().mean(1, keepdim=True)
        return (model(x) - wanted).square().mean()

    return (
        f"sines {width}x2 batch={batch} steps={steps:,}",
        dict(model.named_parameters()),
        loss,
        steps,
    )


def final(problem: Callable[[], Problem], checkpoint: str) -> float:
    """Loss over the last twentieth of a run, in units of the first one."""
    _, params, loss, steps = problem()
    for param in params.values():
        param.requires_grad_()
    optimizer = LearnedOptimizer(
        list(params.values()), checkpoint, total_steps=steps, weight_decay=0.0
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return sum(losses[-(steps // 20) :]) / (steps // 20) / losses[0]


def problems() -> Iterator[Callable[[], Problem]]:
    """All of them, boundary values first."""
    for seed in range(PROBLEMS):
        yield partial(boundary, seed)
    for kind in SINES:
        for seed in range(2):
            yield partial(sines, *kind, seed)


def main() -> None:
    """Print the table."""
    rows, logs = [], []
    for number, problem in enumerate(problems()):
        found = [final(problem, checkpoint) for checkpoint in CHECKPOINTS]
        rows.append([problem()[0], *(f"{value:.1e}" for value in found)])
        if number < PROBLEMS:
            logs.append([math.log(value / found[0]) for value in found])
    means = torch.tensor(logs).mean(0).exp().tolist()
    rows.append(["boundary values over general-5's", *(f"{value:.2f}" for value in means)])
    print(table(["problem", *CHECKPOINTS], rows))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
