"""Task families by name: those of this package, and those of modules of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import FixedTask, Task, TaskFamily, TaskOptions

#: Stands for a module in the names of tasks that were handed over in Python.
GIVEN = "meta_train"

Builder = Callable[[TaskOptions], TaskFamily]


@dataclass(frozen=True)
class Horizon:
    """For how many steps a task of the field is trained."""

    steps: int
    """In the whole field: what its users would take."""
    quick: int
    """In the quick tier: a few seconds of one core."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task that never meta-trains.

    Attributes:
        make: builds it; called once per :func:`build_tasks`.
        horizon: its numbers of steps, if it belongs to the field.
        data_set: the image set of which it reads all training images.
    """

    make: Callable[[DataOptions], Task]
    horizon: Horizon | None = None
    data_set: str | None = None


def evaluation_tables(
    tasks: dict[str, EvaluationTask],
) -> tuple[dict[str, Builder], dict[str, Horizon]]:
    """The tables ``FAMILIES`` and ``FIELD`` of a module, from its tasks by name."""

    def builder(name: str, found: EvaluationTask) -> Builder:
        def build(options: TaskOptions) -> TaskFamily:
            if options.split == "meta":
                raise ValueError(
                    f"{name!r} is for evaluation only: meta-training on it would leak the "
                    f"evaluation. To meta-train on your own data, write a family of your own"
                )
            family = FixedTask(found.make(options.data), stackable=False)
            if found.data_set is not None:
                family.data_sets, family.halved = (found.data_set,), False
            return family

        return build

    horizons = {name: found.horizon for name, found in tasks.items()}
    return (
        {name: builder(name, found) for name, found in tasks.items()},
        {name: horizon for name, horizon in horizons.items() if horizon is not None},
    )


def field_tasks() -> dict[str, Horizon]:
    """The field: tasks that people recognise, by name, from the ``FIELD`` table of every module."""
    found: dict[str, Horizon] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(getattr(module, "FIELD", {}))
    return found


def described_families() -> dict[str, list[str]]:
    """Names of the task families by what their module says of them in its first line."""
    found: dict[str, list[str]] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        about = (module.__doc__ or "").strip().partition("\n")[0]
        found[about.rstrip(".")] = sorted(module.FAMILIES)
    return found


def _families() -> dict[str, Builder]:
    found: dict[str, Builder] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(module.FAMILIES)
    return found


def task_names() -> list[str]:
    """Names of all registered task families."""
    return sorted(_families())


def build_tasks(name: str, options: TaskOptions | None = None) -> TaskFamily:
    """The task family registered under ``name``.

    Args:
        name: a registered name, or ``"module:name"`` for an entry of the ``FAMILIES`` table of any
            importable module: your own tasks, in recipes and on the command line too.
        options: which split, and where data is.

    Raises:
        ValueError: unknown name (the message lists those that exist), or the family has no
            images that may meta-train.
        FileNotFoundError: its data is not there.
    """
    module, _, own = name.rpartition(":")
    if module == GIVEN:
        raise ValueError(
            f"the task {own!r} was given to meta_train() as an object: go on from Python, by the "
            f"same call. A task that a module's FAMILIES table names is known to every command"
        )
    families = _families_of(module) if module else _families()
    if own not in families:
        raise unknown_name("task", name, [f"{module}:{n}" if module else n for n in families])
    return families[own](options or TaskOptions())


def _families_of(module: str) -> dict[str, Any]:
    """The ``FAMILIES`` table of a module of the user's."""
    try:
        found: dict[str, Any] = importlib.import_module(module).FAMILIES
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"no tasks from module {module!r} ({error}): it must be importable (PYTHONPATH) and "
            f"define FAMILIES, a table from names to functions of TaskOptions"
        ) from error
    return found


def field_horizon(name: str) -> Horizon:
    """For how many steps a task of the field is trained.

    Raises:
        ValueError: the task is not of the field.
    """
    horizons = field_tasks()
    if name not in horizons:
        raise ValueError(
            f"the task {name!r} is not of the field, which states a number of steps for each of "
            f"its tasks: give steps. Of it are: {', '.join(sorted(horizons))}"
        )
    return horizons[name]
