"""Tasks: what is optimized. One file per family, registered by its ``FAMILIES`` table."""

from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    ModuleTask,
    Params,
    Task,
    TaskFamily,
    TaskMixture,
    TaskOptions,
    as_family,
    obstacle_to_stacking,
)
from learned_optim.meta.tasks._registry import (
    GIVEN,
    build_tasks,
    described_families,
    field_steps,
    field_tasks,
    task_names,
)

__all__ = [
    "GIVEN",
    "Batch",
    "FixedTask",
    "ModuleTask",
    "Params",
    "Task",
    "TaskFamily",
    "TaskMixture",
    "TaskOptions",
    "as_family",
    "build_tasks",
    "described_families",
    "field_steps",
    "field_tasks",
    "obstacle_to_stacking",
    "task_names",
]
