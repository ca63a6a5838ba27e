"""Tuned AdamW on validation tasks: what meta-trained weights are measured against.

The runs are made once, before training, and kept in the run folder. They are the runs on which
weights are validated, so they share nothing with those of a test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from learned_optim.checkpoint import write_text

FILE = "references.json"

#: Learning rates among which AdamW is tuned on task families: small sigmoid networks take 0.3 for a
#: hundred steps, and a best rate at the end of the grid would make a rival of what is not tuned.
ADAMW_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Reference:
    """AdamW on a validation run.

    Attributes:
        index: of the validation run.
        task: what was drawn; runs of one task share a learning rate.
        steps: length of the run.
        known: whether the rule is told the length, and AdamW follows a cosine.
        scores: the lower the better, by learning rate: the log of the final over the first loss in
            trainings by evolution strategies, the summed loss in those by backpropagation.
    """

    index: int
    task: str
    steps: int
    known: bool
    scores: tuple[float, ...] = ()


def best_score(reference: Reference) -> float:
    """The score at the best of the learning rates."""
    finite = [score for score in reference.scores if not math.isnan(score)]
    return min(finite, default=math.nan)


def read_references(folder: Path) -> list[Reference]:
    """Those that the run folder has; an empty list if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        lines = json.loads(path.read_text())
        return [Reference(**{**line, "scores": tuple(line["scores"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and tuned AdamW runs again"
        ) from error


def write_references(folder: Path, references: Sequence[Reference]) -> None:
    """Write them into the run folder, one a line."""
    lines = [json.dumps(asdict(reference)) for reference in references]
    write_text(folder / FILE, "[\n" + ",\n".join(lines) + "\n]\n")


def mean_sum(sums: Sequence[float], geometric: bool) -> float:
    """Mean of summed losses; infinite if it is not finite, or not real."""
    if geometric and min(sums) <= 0:
        return math.inf
    values = [math.log(value) for value in sums] if geometric else sums
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return math.inf
    return math.exp(mean) if geometric else mean


def tuned_sums(references: Sequence[Reference]) -> list[float]:
    """Every run's summed loss at the learning rate that is best for the runs of its task."""
    tuned: dict[str, int] = {}
    for task in {reference.task for reference in references}:
        rows = [reference.scores for reference in references if reference.task == task]
        means = [mean_sum(column, geometric=False) for column in zip(*rows, strict=True)]
        tuned[task] = means.index(min(means))
    return [reference.scores[tuned[reference.task]] for reference in references]
