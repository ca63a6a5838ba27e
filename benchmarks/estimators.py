"""Bias, spread, memory and time of the estimators of meta-gradients: docs/estimators.md.

On a problem whose gradients are known exactly (:mod:`benchmarks.noisy_quadratic`), and on a small
task: perceptrons on scikit-learn's digits under the rule `horizon`. `python -m benchmarks
estimators` measures in some ten minutes; `python -m benchmarks page` writes the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import in_child, peak_memory
from benchmarks.noisy_quadratic import ExactGradients, NoisyQuadratic, TwoRates, exact_gradients
from learned_optim.meta import ESTIMATORS, EstimatorOptions, Optimizees, build_tasks
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import Task
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule
from learned_optim.summary import table

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "performance" / "estimators.json"

#: The known problem: runs of 100 steps in 10 unrolls, at weights where truncation turns the sign.
RATES, UNROLLS, STEPS, KNOWN_SEEDS = (0.15, 0.1), 10, 10, 64
#: The small task: runs of 30 steps in 3 unrolls, by an untrained rule.
FAMILY, DIGITS_UNROLLS, DIGITS_STEPS, DIGITS_SEEDS = "digits-torch", 3, 10, 24
RULE = HorizonConfig(hidden_size=8)
#: The reference of the small task: full backpropagation through other runs.
REFERENCE_SEEDS = 64
#: Optimizees side by side where memory and time are measured.
TOGETHER = 8


@dataclass(frozen=True)
class Subject:
    """An estimator and what it is told.

    Attributes:
        name: under which it is registered.
        whole: one unroll of the whole run instead of truncated ones.
    """

    name: str
    whole: bool = False
    pairs: int = 4
    sigma: float = 0.01

    def __str__(self) -> str:
        if self.name in ("es", "pes"):
            return f"`{self.name}`, {self.pairs} pairs, sigma {self.sigma}"
        return f"`{self.name}`" + (", whole run" if self.whole else "")

    def run(self, rule: UpdateRule, task: Task, unrolls: int, steps: int, seed: str) -> Tensor:
        """The meta-gradient of a run, summed over its unrolls, flat."""
        dtype = rule.dtype
        optimizees = Optimizees(rule, [task], [seeded("estimators", seed)], dtype)
        options = EstimatorOptions(
            generator=seeded("perturbations", seed), pairs=self.pairs, sigma=self.sigma
        )
        if self.whole:
            unrolls, steps = 1, unrolls * steps
        total = torch.zeros((), dtype=dtype)
        for _ in range(unrolls):
            grads = ESTIMATORS[self.name](rule, optimizees, steps, options).grads
            total = total + torch.cat([grad.flatten() for grad in grads])
        return total


SUBJECTS = (
    Subject("replay"),
    Subject("autograd"),
    Subject("full"),
    Subject("full", whole=True),
    Subject("es"),
    Subject("es", sigma=0.03),
    Subject("pes"),
    Subject("pes", sigma=0.03),
    Subject("pes", pairs=16, sigma=0.03),
)


def _target(subject: Subject, exact: ExactGradients) -> Tensor:
    if subject.name == "full":
        return exact.whole if subject.whole else exact.truncated
    targets = {"es": exact.smoothed_truncated, "pes": exact.smoothed_whole}
    return targets.get(subject.name, exact.first_order)


def known_problem() -> dict[str, Any]:
    """Every estimator against the exact gradient of the whole run."""
    task, rule = NoisyQuadratic(), TwoRates(RATES)
    rows = []
    for subject in SUBJECTS:
        exact = exact_gradients(task, RATES, UNROLLS, STEPS, subject.sigma)
        target, whole = _target(subject, exact), exact.whole
        estimates = (
            torch.stack(
                [subject.run(rule, task, UNROLLS, STEPS, str(s)) for s in range(KNOWN_SEEDS)]
            )
            / task.copies
        )
        error = estimates.std(0) / KNOWN_SEEDS**0.5
        rows.append({
            "subject": str(subject),
            "mean": estimates.mean(0).tolist(),
            "error": error.tolist(),
            "target": target.tolist(),
            "off": ((estimates.mean(0) - target) / error).abs().max().item(),
            "bias": ((target - whole).norm() / whole.norm()).item(),
            "std": (estimates.var(0).sum().sqrt() / whole.norm()).item(),
        })  # fmt: skip
        print(f"  {rows[-1]}", flush=True)
    return {"whole": exact.whole.tolist(), "task": asdict(task), "seeds": KNOWN_SEEDS, "rows": rows}


def _digits_rule() -> HorizonRule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HorizonRule(RULE)


def digits() -> dict[str, Any]:
    """Every estimator against full backpropagation through other whole runs.

    Its mean is a vector of hundreds of weights and known to some percent alone. So the estimates
    are projected on it: 1 is the full gradient's length, and an unbiased estimator's mean.
    """
    rule, family = _digits_rule(), build_tasks(FAMILY)

    def runs(subject: Subject, seeds: int, label: str) -> Tensor:
        return torch.stack([
            subject.run(rule, family.sample(seeded("task", s)), DIGITS_UNROLLS, DIGITS_STEPS,
                        f"{label} {s}")
            for s in range(seeds)
        ]).double()  # fmt: skip

    references = runs(Subject("full", whole=True), REFERENCE_SEEDS, "reference")
    reference = references.mean(0)
    length = reference.norm()
    uncertain = (references.var(0).sum() / REFERENCE_SEEDS).sqrt() / length
    print(f"  reference: {length:.4g}, uncertain by {uncertain:.3f} of its length", flush=True)
    rows = []
    for subject in SUBJECTS:
        estimates = runs(subject, DIGITS_SEEDS, "estimate")
        shares = estimates @ reference / length**2
        rows.append({
            "subject": str(subject),
            "share": shares.mean().item(),
            "error": shares.std().item() / DIGITS_SEEDS**0.5,
            "along": shares.std().item(),
            "std": (estimates.var(0).sum().sqrt() / length).item(),
        })  # fmt: skip
        print(f"  {rows[-1]}", flush=True)
    return {
        "rows": rows,
        "weights": len(reference),
        "seeds": DIGITS_SEEDS,
        "reference_seeds": REFERENCE_SEEDS,
        "reference_uncertainty": uncertain.item(),
    }


def cost(name: str, steps: int) -> dict[str, float]:
    """Seconds per inner step, the least of five unrolls, and peak bytes of one unroll."""
    rule, family = _digits_rule(), build_tasks(FAMILY)
    generators = [seeded("cost", i) for i in range(TOGETHER)]
    optimizees = Optimizees(rule, [family.sample(g) for g in generators], generators)
    options = EstimatorOptions(generator=seeded("perturbations"))

    def unroll() -> None:
        ESTIMATORS[name](rule, optimizees, steps, options)

    ESTIMATORS[name](rule, optimizees, 2, options)
    optimizees.carry = None  # the copies that `pes` keeps are to be counted
    peak, seconds = peak_memory(unroll), []
    for _ in range(5):
        started = time.thread_time()
        unroll()
        seconds.append((time.thread_time() - started) / steps)
    return {"seconds": min(seconds), "peak": peak}


def measure() -> dict[str, Any]:
    """Everything; some ten minutes."""
    torch.set_num_threads(1)
    costs: dict[str, Any] = {}
    for name in ESTIMATORS:
        costs[name] = {
            str(steps): in_child("benchmarks.estimators:cost", name, steps) for steps in (20, 100)
        }
        print(f"  {name}: {costs[name]}", flush=True)
    return {"cost": costs, "known": known_problem(), "digits": digits()}


# ---- the page


def _known_table(found: dict[str, Any]) -> str:
    rows = [
        [
            row["subject"],
            ", ".join(f"{x:.2f}" for x in row["target"]),
            ", ".join(f"{x:.2f} ± {e:.2f}" for x, e in zip(row["mean"], row["error"], strict=True)),
            f"{row['bias']:.2f}",
            f"{row['std']:.2f}",
        ]
        for row in found["rows"]
    ]
    return table(
        ["estimator", "its target, exactly", "mean measured", "bias", "standard deviation"], rows
    )


def _digits_table(found: dict[str, Any]) -> str:
    rows = [
        [
            row["subject"],
            f"{row['share']:.2f} ± {row['error']:.2f}",
            f"{row['along']:.2f}",
            f"{row['std']:.2f}",
        ]
        for row in found["rows"]
    ]
    return table(
        ["estimator", "share of the full gradient", "its standard deviation",
         "standard deviation of the whole vector"],
        rows,
    )  # fmt: skip


def _cost_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"`{name}`" + (", 4 pairs" if name in ("es", "pes") else ""),
            *(f"{row[steps]['peak'] / 2**20:.1f}" for steps in ("20", "100")),
            *(f"{1000 * row[steps]['seconds']:.1f}" for steps in ("20", "100")),
        ]
        for name, row in found.items()
    ]
    return table(
        ["estimator", "MiB, 20 steps", "MiB, 100 steps", "ms per step, 20 steps",
         "ms per step, 100 steps"],
        rows,
    )  # fmt: skip


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "known": _known_table,
    "digits": _digits_table,
    "cost": _cost_table,
}


def page(file: dict[str, Any]) -> str:
    """The page, from the template and what was measured."""
    machine, found = file["machine"], file["found"]
    text = (Path(__file__).parent / "estimators_template.md").read_text()
    for name, body in _TABLES.items():
        text = text.replace(f"{{{name}}}", body(found[name]))
    known = found["known"]
    text = text.replace("{whole}", ", ".join(f"{x:.2f}" for x in known["whole"]))
    text = text.replace("{off}", f"{max(row['off'] for row in known['rows']):.1f}")
    text = text.replace("{uncertain}", f"{found['digits']['reference_uncertainty']:.2f}")
    return text.replace(
        "{machine}",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date']}",
    )


def write_page() -> None:
    """docs/estimators.md."""
    (ROOT / "docs" / "estimators.md").write_text(page(json.loads(OUTPUT.read_text())))
