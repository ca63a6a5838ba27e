"""Validation of weights by evolution strategies' tasks: how far runs end behind tuned AdamW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from learned_optim.checkpoint import write_text
from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta.data import DataOptions
from learned_optim.meta.trainer import Report
from learned_optim.rules import RuleConfig

REFERENCES = "references.json"

# A task counts at most this much, in log loss behind tuned AdamW.
_LARGEST_EXCESS = 1.5

#: Figures of one set of weights by name; None where no task has a run of that kind.
Excess: TypeAlias = dict[str, float | None]


def references(
    folder: Path,
    tasks: int,
    mixture: str,
    data: DataOptions,
    run: jobs.Map,
    report: Report | None = None,
) -> list[jobs.Reference]:
    """Tuned AdamW on the first validation tasks; runs what is missing in the folder and keeps it.

    Args:
        folder: where ``references.json`` is or will be, rewritten after every task.
        tasks: how many.
        mixture: of which.
        data: where MNIST is.
        run: maps a function over jobs.
        report: told ``("references", runs done, runs in all)``.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / REFERENCES
    found = {reference.index: reference for reference in _read(path)}
    missing = [(index, mixture, data) for index in range(tasks) if index not in found]
    for done, reference in enumerate(run(jobs.reference_task, missing), 1):
        found[reference.index] = reference
        lines = [json.dumps(asdict(found[index])) for index in sorted(found)]
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
        if report is not None:
            report("references", tasks - len(missing) + done, tasks)
    return [found[index] for index in range(tasks)]


def _read(path: Path) -> list[jobs.Reference]:
    if not path.exists():
        return []
    try:
        lines = json.loads(path.read_text())
        return [jobs.Reference(**{**line, "scores": tuple(line["scores"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and tuned AdamW runs again"
        ) from error


def validate(
    weights: Mapping[str, Tensor],
    rule: RuleConfig,
    mixture: str,
    against: list[jobs.Reference],
    data: DataOptions,
    run: jobs.Map,
    report: Report | None = None,
) -> dict[str, Excess]:
    """Log of the final loss minus that of tuned AdamW, for several sets of weights.

    Args:
        weights: vectors of shape ``(n,)`` by name.
        rule: whose weights they are.
        mixture: of the tasks.
        against: what :func:`references` gave.
        data: where MNIST is.
        run: maps a function over jobs.
        report: told ``("validation", runs done, runs in all)``.

    Returns:
        By name of the weights: ``mean`` over tasks, each counting at most 1.5; ``median``;
        ``mean_known`` and ``mean_unknown``, of runs whose length the rule is told or not; and
        ``share_ahead``, the share of tasks on which the rule ends below AdamW.
    """
    import numpy as np  # of an extra: see populations._rollout

    stacked = torch.stack(list(weights.values()))
    todo = [jobs.ValidationJob(found.index, mixture, stacked, rule, data) for found in against]
    rows = []
    for reference, score in zip(against, run(jobs.validate_task, todo), strict=True):
        rows.append(np.array(score) - jobs.best_score(reference))
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
