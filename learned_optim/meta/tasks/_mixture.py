"""Several tasks with weights as one family."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator

from learned_optim.meta.tasks._base import FixedTask, Task, TaskFamily


class TaskMixture(TaskFamily):
    """Draws one of several families, in proportion to their weights, and a task from it.

    Example:
        >>> mixture = TaskMixture({"deep": deep, "wide": wide}, {"deep": 3, "wide": 1})

    Args:
        members: tasks or families by name.
        weights: by the same names, positive and of any sum; equal if not given.

    Raises:
        ValueError: no members, or weights that do not fit them.
    """

    stackable = False

    def __init__(
        self,
        members: Mapping[str, Task | TaskFamily],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not members:
            raise ValueError("a mixture needs at least one task")
        given = dict.fromkeys(members, 1.0) if weights is None else dict(weights)
        if set(given) != set(members):
            raise ValueError(
                f"a mixture of {', '.join(members)} needs a weight for each and no other, got "
                f"weights for {', '.join(given) or 'none'}"
            )
        wrong = [f"{n}: {w}" for n, w in given.items() if not (w > 0 and math.isfinite(w))]
        if wrong:
            raise ValueError(
                f"weights of tasks must be positive and finite, got {', '.join(wrong)}"
            )
        self.members = {name: as_family(member) for name, member in members.items()}
        total = sum(given.values())
        self.shares = {name: given[name] / total for name in members}
        families = self.members.values()
        self.data_sets = tuple(dict.fromkeys(name for f in families for name in f.data_sets))
        self.halved = all(family.halved for family in families)

    def sample(self, generator: Generator) -> Task:
        shares = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        drawn = int(torch.multinomial(shares, 1, generator=generator))
        return list(self.members.values())[drawn].sample(generator)


def as_family(task: Task | TaskFamily) -> TaskFamily:
    """A task as the family with that one member; a family as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(task, TaskFamily):
        return task
    if not isinstance(task, Task):
        raise ValueError(
            f"a task must be a Task or a TaskFamily, and is a {type(task).__name__}: "
            f"ModuleTask(module, batches, criterion) makes one of a module"
        )
    return FixedTask(task)
