"""Meta-training of update rules: tasks, meta-gradients, trainers."""

from learned_optim.meta.data import DataOptions
from learned_optim.meta.estimators import ESTIMATORS, EstimatorOptions, MetaGradient
from learned_optim.meta.recipes import EvolutionRecipe, Recipe, load_recipe, recipes
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.tasks import (
    FixedTask,
    ModuleTask,
    Task,
    TaskFamily,
    TaskMixture,
    TaskOptions,
    build_tasks,
    task_names,
)
from learned_optim.meta.trainer import MetaTrainer
from learned_optim.meta.training import MetaTrained, meta_train

__all__ = [
    "ESTIMATORS",
    "DataOptions",
    "EstimatorOptions",
    "EvolutionRecipe",
    "FixedTask",
    "MetaGradient",
    "MetaTrained",
    "MetaTrainer",
    "ModuleTask",
    "Optimizees",
    "Recipe",
    "Task",
    "TaskFamily",
    "TaskMixture",
    "TaskOptions",
    "build_tasks",
    "load_recipe",
    "meta_train",
    "recipes",
    "task_names",
]
