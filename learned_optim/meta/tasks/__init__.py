"""Tasks: what is optimized. One file per family, registered by its ``FAMILIES`` table."""

from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    ModuleTask,
    Params,
    Task,
    TaskFamily,
    TaskOptions,
    build_tasks,
    described_families,
    obstacle_to_stacking,
    task_names,
)

__all__ = [
    "Batch",
    "FixedTask",
    "ModuleTask",
    "Params",
    "Task",
    "TaskFamily",
    "TaskOptions",
    "build_tasks",
    "described_families",
    "obstacle_to_stacking",
    "task_names",
]
