"""Mixtures of tasks that meta-train the horizon rule, and the lengths of their runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Generator

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Population, UnusableTaskError
from learned_optim.meta.populations.autoencoders import Autoencoder
from learned_optim.meta.populations.boundary import BoundaryValue
from learned_optim.meta.populations.classification import (
    Classification,
    DeepClassification,
    FewExamples,
    WideClassification,
)
from learned_optim.meta.populations.convolutions import ConvNet
from learned_optim.meta.populations.coordinates import Coordinates
from learned_optim.meta.populations.embeddings import MatrixFactorization, SkipGram
from learned_optim.meta.populations.quadratics import Quadratic
from learned_optim.meta.populations.restarts import Restart
from learned_optim.meta.populations.sequences import DeepSequences, Sequences
from learned_optim.meta.populations.tabular import HeldOutTeacher, Teacher
from learned_optim.meta.sampler import Sampler

#: Mixtures by name: families and how often each is drawn, relative to the others. The order matters
#: to the draws. A mixture never changes under its name, because a seed stands for a task of it.
MIXTURES: dict[str, dict[type[Population], int]] = {
    "populations-2": {
        Classification: 20,
        Teacher: 13,
        Quadratic: 3,
        Coordinates: 10,
        BoundaryValue: 3,
        MatrixFactorization: 7,
        SkipGram: 3,
        Sequences: 22,
        ConvNet: 8,
        Autoencoder: 9,
        Restart: 26,
        WideClassification: 6,
    },
    "populations-3": {
        Classification: 14,
        Teacher: 7,
        Quadratic: 3,
        Coordinates: 10,
        BoundaryValue: 4,
        MatrixFactorization: 8,
        SkipGram: 3,
        Sequences: 20,
        ConvNet: 10,
        Autoencoder: 9,
        Restart: 24,
        WideClassification: 6,
        FewExamples: 9,
        HeldOutTeacher: 9,
        DeepClassification: 8,
        DeepSequences: 10,
    },
}
#: What a rule trained on a mixture has seen, and what lies beyond, for the records of checkpoints.
TRAINED_FOR = {
    "populations-2": (
        "runs of 100 to 3,000 steps, widths to 2,048 in one hidden layer, to 512 in up to 3 and to "
        "192 in up to 8, transformers to width 96 and 3 layers, batches of 4 to 512; longer runs "
        "follow the schedule of the rule with what was learned at 3,000 steps, larger networks are "
        "extrapolation"
    ),
    "populations-3": (
        "runs of 100 to 10,000 steps, widths to 2,048 in one hidden layer, to 512 in up to 3 and "
        "to 96 in up to 20, transformers to width 96 and 8 layers, batches of 4 to 512"
    ),
}

ATTEMPTS = 50
SCALED_SHARE, UNKNOWN_SHARE = 0.2, 0.3
SHORTEST_RUN = 100
LONG_SHARE, LONGEST_RUN = 0.1, 10_000
# A run of eight copies may take about this many seconds on one core, and always this many steps.
SECONDS, ALWAYS = 5.0, 80
# What a step costs, in seconds: of the whole, per parameter; and operations per second.
_PER_STEP, _PER_PARAMETER, _PRODUCTS_PER_SECOND = 1.5e-3, 2.5e-9, 4e10
_COPIES = 8


@dataclass(frozen=True)
class Draw:
    """A run to be made; ``known`` is whether the rule is told its length."""

    task: Population
    steps: int
    known: bool


def draw(
    seed: int,
    data: DataOptions,
    mixture: str,
    *,
    shortest: int = SHORTEST_RUN,
    large: bool = False,
) -> Draw:
    """The run of a seed: its task, its length and whether the rule knows it.

    Args:
        seed: the same seed gives the same task, with the same release of torch.
        data: where MNIST is.
        mixture: a key of :data:`MIXTURES`.
        shortest: steps that runs have at least, where they are not too costly for that.
        large: take widths and batches from the upper part of their ranges.

    Raises:
        FileNotFoundError: the task needs images and they are not there.
        ValueError: none of fifty draws was usable.
    """
    task, sampler = _sample(seed, data, mixture, large)
    longest = longest_run(task)
    if mixture == "populations-3":
        longest = longest_run(task, 0.6)  # bases cost as much again
        if sampler.chance(LONG_SHARE):
            longest = longest_run(task, 5)
            shortest = longest // 2
    steps = sampler.log_integer(min(shortest, longest - 1), longest)
    return Draw(task, steps, known=not sampler.chance(UNKNOWN_SHARE))


def longest_run(task: Population, longer: float = 1) -> int:
    """Most steps of a run of the task, by its family and the cost of a step.

    ``longer`` is a factor on both, to 10,000 steps.
    """
    params = task.init(Generator().manual_seed(0))
    count = sum(value.numel() for value in params.values())
    seconds = _COPIES * count * (6 * task.rows / _PRODUCTS_PER_SECOND + _PER_PARAMETER) + _PER_STEP
    affordable = max(ALWAYS, longer * SECONDS / seconds)
    return int(min(max(1, longer) * task.longest_run, affordable, LONGEST_RUN))


def _sample(seed: int, data: DataOptions, mixture: str, large: bool) -> tuple[Population, Sampler]:
    """The task of a seed, and the sampler for the draws about its run."""
    families = MIXTURES[mixture]
    for attempt in range(ATTEMPTS):
        sampler = Sampler(Generator().manual_seed(seed * 1000 + attempt), large)
        family = sampler.choice(list(families), list(families.values()))
        try:
            task = family(sampler, data)  # type: ignore[call-arg]
        except UnusableTaskError:
            continue
        if sampler.chance(SCALED_SHARE):
            names = task.init(Generator().manual_seed(0))
            widest = 2.0 if mixture == "populations-3" else 1.5
            task.scales = {name: math.exp(sampler.uniform(-widest, widest)) for name in names}
        task.jitter = sampler.choice([0, 0.5], [9, 1])
        return task, sampler
    raise ValueError(f"no usable task in {ATTEMPTS} draws of seed {seed}")


def run_generators(seed: int) -> tuple[Generator, Generator]:
    """Generators of a seed's initial parameters and batches, and of its jitter."""
    return Generator().manual_seed(seed * 7 + 3), Generator().manual_seed(seed + 5)
