"""Validation runs of a meta-training, and tuned AdamW on them.

AdamW runs once, before training. The run folder keeps its scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from learned_optim.checkpoint import write_text
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import UpdateRule
from learned_optim.rules.classical import SGDRule

REFERENCES = "references.json"

#: Learning rates among which AdamW is tuned on task families. Small sigmoid networks take 0.3 for a
#: hundred steps, and the best rate must not lie at the end of the grid.
ADAMW_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

#: Arguments of :func:`seeded` for the generator of a run.
Seed: TypeAlias = tuple[object, ...]


# ---- tuned AdamW


@dataclass(frozen=True)
class Reference:
    """AdamW on a validation run.

    Attributes:
        index: number of the validation run.
        task: name of the task; runs of one task share a learning rate.
        scores: by learning rate, the lower the better. Evolution strategies score the log of the
            final over the first loss, trainings on unrolls the summed loss.
    """

    index: int
    task: str
    scores: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """The score at the best of the learning rates."""
        return min((score for score in self.scores if not math.isnan(score)), default=math.nan)


def read_references(folder: Path) -> list[Reference]:
    """The references in the run folder; empty if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / REFERENCES
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
    """Write the references into the run folder, one a line."""
    lines = [json.dumps(asdict(reference)) for reference in references]
    write_text(folder / REFERENCES, "[\n" + ",\n".join(lines) + "\n]\n")


def mean_of(sums: Tensor, geometric: bool) -> float:
    """Mean of summed losses, ``(runs,)``; infinite if it is not finite."""
    mean = (sums.log() if geometric else sums).sum().item() / len(sums)
    if not math.isfinite(mean):
        return math.inf
    return math.exp(mean) if geometric else mean


def tuned_sums(references: Sequence[Reference]) -> Tensor:
    """Summed losses of runs at the best rates of their tasks, ``(runs,)``."""
    rates: dict[str, int] = {}
    for task in {reference.task for reference in references}:
        rows = torch.tensor([r.scores for r in references if r.task == task], dtype=torch.float64)
        means = [mean_of(column, geometric=False) for column in rows.t()]
        rates[task] = means.index(min(means))
    return torch.tensor([r.scores[rates[r.task]] for r in references], dtype=torch.float64)


# ---- runs


def summed_losses(
    optimizer: UpdateRule | float,
    family: TaskFamily,
    horizon: int,
    seeds: Sequence[Seed],
    together: int = 8,
    on_runs: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Losses summed over the steps of runs, shape ``(seeds,)``.

    Args:
        optimizer: a frozen rule, or the constant learning rate of AdamW: rules do not know the
            length of these runs.
        horizon: inner steps.
        together: runs side by side.
        on_runs: takes the number of runs done.
    """
    rule = optimizer if isinstance(optimizer, UpdateRule) else SGDRule()
    sums = []
    for low in range(0, len(seeds), together):
        generators = [seeded(*parts) for parts in seeds[low : low + together]]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, stacked=family.stackable)
        advance: Callable[[], Tensor] = partial(optimizees.advance, rule)
        if not isinstance(optimizer, UpdateRule):
            advance = _adamw(optimizees, optimizer)
        with global_generator_seeded(*seeds[low], "forward"):
            sums.append(torch.stack([advance() for _ in range(horizon)]).sum(0))
        on_runs(min(low + together, len(seeds)))
    return torch.cat(sums)


def _adamw(optimizees: Optimizees, lr: float) -> Callable[[], Tensor]:
    """Inner steps of AdamW, a call each; a call returns the losses before it, ``(B,)``."""
    # AdamW is coordinatewise: one packed tensor trains as its parts would.
    weights = nn.Parameter(optimizees.packed)
    adamw = torch.optim.AdamW([weights], lr=lr)

    def advance() -> Tensor:
        losses, weights.grad = optimizees.losses_and_grad(weights, optimizees.next_batch())
        adamw.step()
        optimizees.step += 1
        return losses.detach()

    return advance
