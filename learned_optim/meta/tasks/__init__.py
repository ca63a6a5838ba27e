"""Tasks: what is optimized. One file per family, registered by its ``FAMILIES`` table."""

from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    Horizon,
    ModuleTask,
    Params,
    Task,
    TaskFamily,
    TaskOptions,
    build_tasks,
    described_families,
    field_horizon,
    field_tasks,
    obstacle_to_stacking,
    task_names,
)

__all__ = [
    "Batch",
    "FixedTask",
    "Horizon",
    "ModuleTask",
    "Params",
    "Task",
    "TaskFamily",
    "TaskOptions",
    "build_tasks",
    "described_families",
    "field_horizon",
    "field_tasks",
    "obstacle_to_stacking",
    "task_names",
]
