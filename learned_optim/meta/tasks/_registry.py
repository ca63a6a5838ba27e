"""Task families by name, of this package and of other modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.meta.tasks._base import EvaluationTask, TaskFamily, TaskOptions

#: Stands for a module in the names of tasks that were handed over in Python.
GIVEN = "meta_train"

Builder = Callable[[TaskOptions], TaskFamily]


def field_tasks() -> dict[str, EvaluationTask]:
    """The field: tasks that people recognise, by name."""
    return {
        name: task
        for name, task in _families().items()
        if isinstance(task, EvaluationTask) and task.steps
    }


def described_families() -> dict[str, list[str]]:
    """Names of the task families by the first line of their module's docstring."""
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
    build, options = families[own], options or TaskOptions()
    if options.split == "meta" and isinstance(build, EvaluationTask):
        raise ValueError(
            f"{name!r} is for evaluation only: meta-training on it would leak the evaluation. To "
            f"meta-train on your own data, write a family of your own"
        )
    return build(options)


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


def field_steps(name: str, quick: bool = False) -> int:
    """Length of a run of a task of the field, or of its quick tier.

    Raises:
        ValueError: the task is not of the field.
    """
    field = field_tasks()
    if name not in field:
        raise ValueError(
            f"the task {name!r} is not of the field, which states a number of steps for each of "
            f"its tasks: give steps. Of it are: {', '.join(sorted(field))}"
        )
    return field[name].quick if quick else field[name].steps
