"""Task families by name: those of this package, and those of modules of the user's."""

from __future__ import annotations

import importlib
from typing import Any

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.meta.tasks._base import Builder, Horizon, TaskFamily, TaskOptions

#: Stands for a module in the names of tasks that were handed over in Python.
GIVEN = "meta_train"


def field_tasks() -> dict[str, Horizon]:
    """The field: tasks that people recognise, by name, from the ``FIELD`` table of every module."""
    found: dict[str, Horizon] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(getattr(module, "FIELD", {}))
    return found


def _families() -> dict[str, Builder]:
    """Every module of this package contributes its ``FAMILIES``."""
    found: dict[str, Builder] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(module.FAMILIES)
    return found


def described_families() -> dict[str, list[str]]:
    """Names of the task families by what their module says of them in its first line."""
    found: dict[str, list[str]] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        about = (module.__doc__ or "").strip().partition("\n")[0]
        found[about.rstrip(".")] = sorted(module.FAMILIES)
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
    families = _own_table(module, "FAMILIES") if module else _families()
    if own not in families:
        raise unknown_name("task", name, [f"{module}:{n}" if module else n for n in families])
    return families[own](options or TaskOptions())


def field_horizon(name: str) -> Horizon:
    """For how many steps a task of the field is trained.

    Args:
        name: a registered name, or ``"module:name"`` for an entry of one's own ``FIELD`` table.

    Raises:
        ValueError: the task has no stated number of steps.
    """
    module, _, own = name.rpartition(":")
    table: dict[str, Horizon] = _own_table(module, "FIELD") if module else field_tasks()
    if own not in table:
        raise ValueError(
            f"the task {name!r} is not of the field: the FIELD table of its module states no "
            f"number of steps for it. Known: {', '.join(sorted(table)) or 'none'}"
        )
    return table[own]


def _own_table(module: str, table: str) -> dict[str, Any]:
    """``FAMILIES`` or ``FIELD`` of a module of the user's."""
    try:
        found: dict[str, Any] = getattr(importlib.import_module(module), table)
    except (ModuleNotFoundError, AttributeError) as error:
        content = {"FAMILIES": "functions of TaskOptions", "FIELD": "numbers of steps (Horizon)"}
        raise ValueError(
            f"no tasks from module {module!r} ({error}): it must be importable (PYTHONPATH) and "
            f"define {table}, a table from names to {content[table]}"
        ) from error
    return found
