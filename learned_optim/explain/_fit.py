"""A short formula for what a horizon rule's network answers, and how well it does.

Terms are products of at most two inputs. Orthogonal matching pursuit chooses them one by one: the
term most correlated with what the formula misses so far joins it, and all coefficients are fitted
anew by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from learned_optim.explain._network import Recorded, record
from learned_optim.explain._runs import Trial, population_trials, quick_trials
from learned_optim.rules import UpdateRule, horizon
from learned_optim.rules.closed_form import (
    OUTPUT_NAMES,
    ClosedFormConfig,
    ClosedFormRule,
    input_name,
    term_values,
)
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

#: Terms besides the constant, of the factor on the step and of every share.
STEP_TERMS, SHARE_TERMS = 6, 2
#: Runs that are fitted, and others on which fit and losses are judged.
FITTED_RUNS, HELD_OUT_RUNS = 40, 20
_FIRST_FITTED, _FIRST_HELD_OUT = 3_000_000, 4_000_000
# Of the outputs, as the rule bounds them.
_BOUNDS = (horizon._STEP_BOUND, *[horizon._MIX_BOUND] * (len(OUTPUT_NAMES) - 1))


@dataclass(frozen=True)
class Fidelity:
    """How well a formula stands in for the network.

    Attributes:
        explained: share of the variance of every output, as it acts, on held-out runs (R^2).
        quick: final losses by the formula over those by the network, geometric mean and range, on
            digits, regression and quadratics.
        held_out: the same on held-out runs of the meta-training mixture.
        untrained: the same of the rule without its network, on the same runs: quick, held-out.
        kept: of the log loss that the network gains on the untrained rule, the share that the
            formula keeps, in quick and in held-out runs; ``nan`` where it gains nothing.
    """

    explained: dict[str, float]
    quick: tuple[float, float, float]
    held_out: tuple[float, float, float]
    untrained: tuple[float, float]
    kept: tuple[float, float]


def fit(
    rule: UpdateRule, step_terms: int = STEP_TERMS, share_terms: int = SHARE_TERMS
) -> ClosedFormRule:
    """Fit a formula to a horizon rule's network on runs of the meta-training mixture.

    Raises:
        ValueError: the rule is no ``horizon`` rule with a network.
    """
    if not isinstance(rule, HorizonRule) or isinstance(rule, ClosedFormRule):
        raise ValueError(
            f"a formula is fitted to checkpoints of the rule 'horizon', and this is one of "
            f"{rule.name!r}"
        )
    return fit_to(rule, record(rule, population_trials(FITTED_RUNS, _FIRST_FITTED)),
                  step_terms, share_terms)  # fmt: skip


def fit_to(rule: HorizonRule, seen: Recorded, step_terms: int, share_terms: int) -> ClosedFormRule:
    """Fit a formula to what was recorded."""
    count = seen.inputs.shape[1]
    names = [input_name(index) for index in range(count)]
    library = names + ["*".join(pair) for pair in combinations_with_replacement(names, 2)]
    inputs = seen.inputs.double()
    values = torch.stack([term_values(term, inputs) for term in library], 1)
    outputs: list[str] = []
    terms: list[str] = []
    coefficients: list[float] = []
    for index, output in enumerate(OUTPUT_NAMES):
        # Beyond twice the bound, the bounded answer no longer tells.
        bound = 2 * _BOUNDS[index]
        target = seen.outputs[:, index].double().clamp(-bound, bound)
        chosen, weights = _pursue(values, target, step_terms if index == 0 else share_terms)
        outputs += [output] * len(weights)
        terms += ["1", *(library[c] for c in chosen)]
        coefficients += weights
    constants = {f.name: getattr(rule.config, f.name) for f in fields(HorizonConfig)}
    found = ClosedFormRule(
        ClosedFormConfig(**constants, outputs=tuple(outputs), terms=tuple(terms))
    )
    with torch.no_grad():
        found.coefficients.copy_(torch.tensor(coefficients))
    return found


def _pursue(values: Tensor, target: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Columns of ``values`` chosen for ``target``, and the coefficients: constant, then theirs."""
    centred = values - values.mean(0)
    norms = centred.norm(dim=0)
    usable = norms > 1e-6 * len(values) ** 0.5
    one = torch.ones(len(values), 1, dtype=values.dtype)
    chosen: list[int] = []
    weights = target.mean().reshape(1)
    for _ in range(count):
        residual = target - torch.cat((one, values[:, chosen]), 1) @ weights
        score = (centred.t() @ residual).abs() / norms.clamp(min=1e-12)
        score[~usable] = 0.0
        score[chosen] = 0.0
        chosen.append(int(score.argmax()))
        columns = torch.cat((one, values[:, chosen]), 1)
        weights = torch.linalg.lstsq(columns, target.unsqueeze(1), driver="gelsd").solution[:, 0]
    return chosen, weights.tolist()


def judge(rule: HorizonRule, formula: ClosedFormRule, seeds: int = 2) -> Fidelity:
    """Compare a formula with the network on runs that were not fitted."""
    held_out = population_trials(HELD_OUT_RUNS, _FIRST_HELD_OUT)
    untrained = ClosedFormRule(
        ClosedFormConfig(**{f.name: getattr(rule.config, f.name) for f in fields(HorizonConfig)})
    )
    quick = quick_trials(seeds)
    logs = {
        name: (_logs(own, quick), _logs(own, held_out))
        for name, own in (("network", rule), ("formula", formula), ("untrained", untrained))
    }
    ratios = {
        name: [
            [a - b for a, b in zip(x, y, strict=True)]
            for x, y in zip(own, logs["network"], strict=True)
        ]
        for name, own in logs.items()
    }
    quick_ratio, held_out_ratio = (_summary(part) for part in ratios["formula"])
    return Fidelity(
        explained=explained(formula, record(rule, held_out)),
        quick=quick_ratio,
        held_out=held_out_ratio,
        untrained=(_summary(ratios["untrained"][0])[0], _summary(ratios["untrained"][1])[0]),
        kept=(_kept(ratios, 0), _kept(ratios, 1)),
    )


def explained(formula: ClosedFormRule, seen: Recorded) -> dict[str, float]:
    """Share of the variance of what the network's outputs come to that the formula explains."""
    with torch.no_grad():
        answers = formula.answers(seen.inputs)
    found = {}
    for index, name in enumerate(OUTPUT_NAMES):
        bound = _BOUNDS[index]
        own, wanted = (bound * torch.tanh(x[:, index] / bound) for x in (answers, seen.outputs))
        found[name] = 1.0 - float((own - wanted).square().mean() / wanted.var().clamp(min=1e-12))
    return found


def _kept(ratios: dict[str, list[list[float]]], part: int) -> float:
    gained, lost = (sum(ratios[name][part]) for name in ("untrained", "formula"))
    return 1.0 - lost / gained if gained > 0 else math.nan


def _logs(rule: UpdateRule, trials: Sequence[Trial]) -> list[float]:
    return [trial.log_final(rule) for trial in trials]


def _summary(logs: list[float]) -> tuple[float, float, float]:
    """Geometric mean, smallest and largest of ratios given as logs."""
    return math.exp(sum(logs) / len(logs)), math.exp(min(logs)), math.exp(max(logs))
