"""What the parts of the horizon rule bring, on tasks of its mixture that never trained it.

    python -m benchmarks.backbone --tasks 100 --workers 2    # ten minutes, $LEARNED_OPTIM_DATA

Compares the untrained rule at two base steps, with the trust and without, and the shipped weights
of `general-3`; of `general-3` with a trust it was not trained for, which `general-4` starts as; of
`general-4`, whole, on the way there, and never told the length of the run; and of the default.
Figures are logs of the final loss minus that of AdamW tuned over six learning rates (with warm-up,
and a cosine where the length of the run is known), on how many tasks it is more than 5 % behind the
untrained rule at its own step, and how far the loss rose above the first. Writes
docs/results/backbone.json. Only MNIST's meta-training half and synthetic data are read.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from learned_optim import load_rule
from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta.data import DataOptions
from learned_optim.meta.evolution import initial_weights
from learned_optim.meta.populations import ADAMW_LRS, Draw, draw, roll, roll_adamw, scores
from learned_optim.meta.populations._rollout import rise
from learned_optim.meta.recipes.general_4 import RECIPE
from learned_optim.pretrained import ALIASES, list_pretrained
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

OUTPUT = Path(__file__).parent.parent / "docs" / "results" / "backbone.json"
CHECKPOINTS = ("general-3", "general-4")
TRUST = {name: getattr(RECIPE.rule, name) for name in ("trust_start", "trust_gain")}
# Far from the seeds of training and validation.
FIRST_SEED, SHORTEST, LONGEST = 20_000_000, 100, 500
STEPS = (0.1, 0.2)
BACKBONE = f"untrained, step {STEPS[0]:g}, trust"
LARGEST_EXCESS = 1.5
SHARES = (0.25, 0.5, 0.75)


@functools.cache  # once per worker
def rules() -> dict[str, tuple[HorizonRule, bool]]:
    """Rules by label, and whether they may know the length of the run."""
    found: dict[str, tuple[HorizonRule, bool]] = {
        f"untrained, step {step:g}{name}": (HorizonRule(HorizonConfig(base_step=step, **own)), True)
        for name, own in (("", {}), (", trust", TRUST))
        for step in STEPS
    }
    begun = HorizonRule(HorizonConfig(**TRUST))
    vector_to_parameters(initial_weights(begun, RECIPE.seed, RECIPE.start), begun.parameters())
    found["general-3 with a trust"] = begun, True
    if CHECKPOINTS[-1] in list_pretrained():
        start, end = (
            parameters_to_vector(each.parameters()).detach()
            for each in (begun, load_rule(CHECKPOINTS[-1]))
        )
        for share in SHARES:
            nearer = HorizonRule(begun.config)
            vector_to_parameters(end.lerp(start, share), nearer.parameters())
            found[f"{CHECKPOINTS[-1]}, {share:.0%} of the start"] = nearer, True
    for name in CHECKPOINTS:
        if name in list_pretrained():
            rule = load_rule(name)
            assert isinstance(rule, HorizonRule)
            found[name] = rule, True
            found[f"{name}, never told the length"] = rule, False
    default = load_rule("default")
    assert isinstance(default, HorizonRule)
    found[ALIASES["default"]] = default, True
    return found


def measure(job: tuple[int, bool, DataOptions]) -> dict[str, Any]:
    """One task: of every rule, the excess over tuned AdamW and the rise."""
    index, large, data = job
    seed = FIRST_SEED + index
    run = draw(seed, data, SHORTEST, large, mixture=RECIPE.task)
    run = Draw(run.task, min(run.steps, LONGEST), run.known)
    best = float(np.nanmin(scores(roll_adamw(ADAMW_LRS, run, seed))[0]))
    figures = {}
    for label, (rule, told) in rules().items():
        weights = parameters_to_vector(rule.parameters()).detach()[None]
        losses = roll(rule, weights, replace(run, known=run.known and told), seed)
        figures[label] = float(scores(losses)[0][0]) - best, float(rise(losses)[0])
    return {"family": type(run.task).__name__, "known": run.known, "figures": figures}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over tasks, by label, with the standard error of the mean."""
    found = {}
    backbone = np.array([row["figures"][BACKBONE][0] for row in rows])
    for label in rows[0]["figures"]:
        excess = np.array([row["figures"][label][0] for row in rows])
        bounded = np.clip(excess, -LARGEST_EXCESS, LARGEST_EXCESS)
        found[label] = {
            "mean": round(float(bounded.mean()), 3),
            "error": round(float(bounded.std(ddof=1) / len(rows) ** 0.5), 3),
            "median": round(float(np.median(excess)), 3),
            "share_ahead": round(float((excess < 0).mean()), 2),
            "share_30_percent_behind": round(float((excess > 0.26).mean()), 2),
            "behind_backbone": int((excess - backbone > math.log(1.05)).sum()),
            "rise": round(float(np.mean([row["figures"][label][1] for row in rows])), 3),
        }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    found: dict[str, Any] = {"tasks": options.tasks}
    with jobs.worker_map(options.workers) as run:
        for sizes, large in (("large", True), ("all", False)):
            todo = [(index, large, DataOptions()) for index in range(options.tasks)]
            found[sizes] = summary(list(run(measure, todo)))
            for label, figures in found[sizes].items():
                print(f"{sizes} {label:45s}", figures, flush=True)
            OUTPUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
