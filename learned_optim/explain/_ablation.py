"""How much worse a rule gets when one input or one unit of its network is held at its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learned_optim.explain._network import input_names, record, without_input, without_unit
from learned_optim.explain._runs import QUICK_STEPS, quick_trials
from learned_optim.rules import UpdateRule


@dataclass(frozen=True)
class Change:
    """Final losses without something, over those with it, of the same runs.

    Attributes:
        name: what was held at its mean.
        ratio: geometric mean.
        worst: the largest of any run.
        best: the smallest of any run.
    """

    name: str
    ratio: float
    worst: float
    best: float


@dataclass(frozen=True)
class Ablation:
    """Changes by input and by unit, the largest first."""

    inputs: list[Change]
    units: list[Change]


def ablate(rule: UpdateRule, seeds: int = 2, steps: int = QUICK_STEPS) -> Ablation:
    """Hold every input, then every unit, at its mean over short runs and do these again."""
    trials = quick_trials(seeds, steps)
    seen = record(rule, trials)
    whole = [trial.log_final(rule) for trial in trials]

    def change(name: str, without: UpdateRule) -> Change:
        logs = [
            trial.log_final(without) - before for trial, before in zip(trials, whole, strict=True)
        ]
        mean = math.exp(sum(logs) / len(logs))
        return Change(name, mean, math.exp(max(logs)), math.exp(min(logs)))

    inputs = [
        change(name, without_input(rule, index, float(seen.inputs[:, index].mean())))
        for index, name in enumerate(input_names(rule))
    ]
    units = [
        change(f"unit {index}", without_unit(rule, index, float(seen.units[:, index].mean())))
        for index in range(seen.units.shape[1])
    ]
    return Ablation(
        *(sorted(c, key=lambda one: -abs(math.log(one.ratio))) for c in (inputs, units))
    )
