"""``learned-optim train RECIPE``: meta-train an update rule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from learned_optim.checkpoint import check_writable
from learned_optim.meta.data import DataOptions
from learned_optim.meta.recipes import (
    EvolutionRecipe,
    Recipe,
    load_recipe,
    recipe_descriptions,
    rule_config,
)
from learned_optim.meta.run_folder import RunFolder
from learned_optim.meta.trainer import MetaTrainer
from learned_optim.meta.unrolls import process_group
from learned_optim.pretrained import load_record

DESCRIPTION = """Meta-train an update rule by a recipe, in a run folder.

RECIPE is one of the names below, a TOML or JSON file, or a run folder. Every field of a recipe is
an option, listed by "learned-optim train RECIPE --help". "--rule NAME" replaces the update rule;
NAME may be "module:name", a rule of your own. Run again, the same command resumes an interrupted
run."""


@dataclass(frozen=True, kw_only=True)
class _Train:
    """Meta-train an update rule; an interrupted run goes on when started again."""

    folder: Path = Path("runs")
    """Run folder: metrics, best checkpoint, resume state."""
    output: Path | None = None
    """Where the finished checkpoint goes; into the run folder if not given."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where image sets are looked for."""

    def meta_train(self, recipe: Recipe | EvolutionRecipe, **options: Any) -> int:
        """Train with a progress bar, and print the results."""
        if self.output is not None:
            check_writable(self.output)
        with process_group():
            trainer = MetaTrainer(recipe, self.folder, self.data, **options)
            path = trainer.run(self.output, progress=True)
        if trainer.method.rank == 0:
            print(f"{trainer.method.summary(load_record(path))}\nwrote {path}")
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainUnrolls(_Train):
    recipe: Recipe
    threads: int = 1
    """Threads of torch. Small optimizees are no faster with more, and differ in the last bits."""
    against_adamw: bool = True
    """Report validation relative to AdamW, which is tuned on its runs before training."""

    def run(self) -> int:
        torch.set_num_threads(self.threads)
        return self.meta_train(self.recipe, against_adamw=self.against_adamw)


@dataclass(frozen=True, kw_only=True)
class TrainWholeRuns(_Train):
    recipe: EvolutionRecipe
    workers: int = 1
    """Processes that share the tasks of a meta-step, a core each."""

    def run(self) -> int:
        return self.meta_train(self.recipe, workers=self.workers)


def options(args: list[str], rule: str | None) -> tuple[str, dict[str, Any], list[str]]:
    """What tyro needs for one recipe, its rule perhaps replaced, or for all if none is given."""
    if args and not args[0].startswith("-"):
        config = configuration(args[0], rule)
        options = {"f": type(config), "default": config, "description": DESCRIPTION}
        return f"train {args[0]}", options, args[1:]
    if args and args[0] not in ("-h", "--help"):
        raise ValueError(
            f"train takes the recipe first, then the options: learned-optim train RECIPE "
            f"{args[0]} ..."
        )
    texts = recipe_descriptions()
    every = tyro.extras.subcommand_type_from_defaults(
        {name: configuration(name, None) for name in texts}, texts
    )
    return "train", {"f": every, "description": DESCRIPTION}, args


def configuration(source: str, rule: str | None) -> TrainUnrolls | TrainWholeRuns:
    """The configuration of a recipe's training, perhaps with another update rule."""
    recipe, folder = load_recipe(source), run_folder(source)
    if rule is not None:
        recipe = replace(recipe, rule=rule_config(rule))
    if isinstance(recipe, EvolutionRecipe):
        return TrainWholeRuns(recipe=recipe, folder=folder)
    return TrainUnrolls(recipe=recipe, folder=folder)


def run_folder(source: str) -> Path:
    """The run folder that the recipe is from, or a new one."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent if path.name == "recipe.json" else None
    if folder is not None and RunFolder.is_one(folder):
        return folder
    return Path("runs") / (folder.resolve().name if folder is not None else path.stem)
