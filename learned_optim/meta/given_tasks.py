"""Tasks that are handed over in Python, by name or as objects, as one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from learned_optim.meta.tasks import (
    GIVEN,
    ModuleTask,
    Task,
    TaskFamily,
    TaskMixture,
    TaskOptions,
    as_family,
    build_tasks,
)

AnyTask: TypeAlias = str | Task | TaskFamily
#: One task, several, or several by name.
Tasks: TypeAlias = AnyTask | Sequence[AnyTask] | Mapping[str, AnyTask]


def family_of(
    tasks: Tasks, weights: Sequence[float] | Mapping[str, float] | None, options: TaskOptions
) -> tuple[str, TaskFamily | None]:
    """The recipe's name for tasks, and their family: ``None`` for one registered task."""
    if isinstance(tasks, (str, Task, TaskFamily)):
        if weights is not None:
            raise ValueError(f"weights={weights!r} are for several tasks, and there is one")
        if isinstance(tasks, str):
            return tasks, None
        return f"{GIVEN}:{name_of(tasks)}", as_family(tasks)
    members = dict(zip(names_of(tasks), members_of(tasks), strict=True))
    if not isinstance(weights, Mapping) and weights is not None:
        if len(weights) != len(members):
            raise ValueError(f"{len(members)} tasks need as many weights, got {len(weights)}")
        weights = dict(zip(members, weights, strict=True))
    families = {
        name: build_tasks(task, options) if isinstance(task, str) else as_family(task)
        for name, task in members.items()
    }
    return f"{GIVEN}:{'+'.join(members)}", TaskMixture(families, weights)


def members_of(tasks: Tasks) -> list[AnyTask]:
    if isinstance(tasks, Mapping):
        return list(tasks.values())
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        return list(tasks)
    return [as_family(tasks) if not isinstance(tasks, str) else tasks]


def names_of(tasks: Tasks) -> list[str]:
    """Names of tasks: those of a mapping, or what they are, numbered where that repeats."""
    if isinstance(tasks, Mapping):
        return list(tasks)
    names: list[str] = []
    for task in members_of(tasks):
        name = name_of(task)
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names


def name_of(task: AnyTask) -> str:
    if isinstance(task, str):
        return task
    inner = getattr(task, "task", task)  # of the family with one member
    return type(inner.module if isinstance(inner, ModuleTask) else inner).__name__
