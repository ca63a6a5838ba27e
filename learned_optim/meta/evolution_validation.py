"""Validation of weights by evolution strategies' tasks: how far runs end behind tuned AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta.evolution_tasks import RunSource
from learned_optim.meta.progress import Report
from learned_optim.meta.references import (
    Reference,
    best_score,
    read_references,
    write_references,
)
from learned_optim.rules import RuleConfig

# A task counts at most this much, in log loss behind tuned AdamW.
_LARGEST_EXCESS = 1.5

#: Figures of one set of weights by name; None where no task has a run of that kind.
Excess: TypeAlias = dict[str, float | None]


def references(
    folder: Path,
    tasks: int,
    source: RunSource,
    run: jobs.Map,
    report: Report | None = None,
) -> list[Reference]:
    """Tuned AdamW on the first validation tasks; runs what is missing in the folder and keeps it.

    Args:
        folder: where ``references.json`` is or will be, rewritten after every task.
        tasks: how many.
        source: of which.
        run: maps a function over jobs.
        report: told ``("references", runs done, runs in all)``.

    Raises:
        ValueError: the file is damaged.
    """
    found = {reference.index: reference for reference in read_references(folder)}
    missing = [(index, source) for index in range(tasks) if index not in found]
    for done, reference in enumerate(run(jobs.reference_task, missing), 1):
        found[reference.index] = reference
        write_references(folder, [found[index] for index in sorted(found)])
        if report is not None:
            report("references", tasks - len(missing) + done, tasks)
    return [found[index] for index in range(tasks)]


def validate(
    weights: Mapping[str, Tensor],
    rule: RuleConfig,
    source: RunSource,
    against: list[Reference],
    run: jobs.Map,
    report: Report | None = None,
) -> dict[str, Excess]:
    """Log of the final loss minus that of tuned AdamW, for several sets of weights.

    Args:
        weights: vectors of shape ``(n,)`` by name.
        rule: whose weights they are.
        source: of the tasks.
        against: what :func:`references` gave.
        run: maps a function over jobs.
        report: told ``("validation", runs done, runs in all)``.

    Returns:
        By name of the weights: ``mean`` over tasks, each counting at most 1.5; ``median``;
        ``mean_known`` and ``mean_unknown``, of runs whose length the rule is told or not; and
        ``share_ahead``, the share of tasks on which the rule ends below AdamW.
    """
    import numpy as np  # of an extra: see populations._rollout

    stacked = torch.stack(list(weights.values()))
    todo = [jobs.ValidationJob(found.index, source, stacked, rule) for found in against]
    rows = []
    for reference, score in zip(against, run(jobs.validate_task, todo), strict=True):
        rows.append(np.array(score) - best_score(reference))
        if report is not None:
            report("validation", len(rows), len(against))
    excess, known = np.array(rows), np.array([reference.known for reference in against])
    return {name: _figures(excess[:, column], known) for column, name in enumerate(weights)}


def _figures(excess: Any, known: Any) -> Excess:
    import numpy as np

    bounded = np.minimum(excess, _LARGEST_EXCESS)
    return {
        "mean": float(bounded.mean()),
        "median": float(np.median(excess)),
        "mean_known": float(bounded[known].mean()) if known.any() else None,
        "mean_unknown": float(bounded[~known].mean()) if not known.all() else None,
        "share_ahead": float((excess < 0).mean()),
    }


def ratio_to_adamw(validation: Mapping[str, Excess]) -> float | None:
    """Geometric mean over tasks of the averaged weights' final loss over tuned AdamW's."""
    mean = validation["average"]["mean"]
    return None if mean is None else math.exp(mean)
