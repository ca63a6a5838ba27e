"""``learned-optim train RECIPE``: meta-train an update rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from learned_optim.cli._arguments import take
from learned_optim.cli._progress import ProgressBar, TrainingProgress

if TYPE_CHECKING:
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.trainer import MetaTrainer, TrainConfig

    AnyConfig = TrainConfig | EvolutionTrainConfig

DESCRIPTION = """Meta-train an update rule by a recipe, in a run folder.

RECIPE is one of the names below, a TOML or JSON file, or a run folder. Every field of a recipe is
an option, listed by "learned-optim train RECIPE --help". "--rule NAME" replaces the update rule;
NAME may be "module:name", a rule of your own. Run again, the same command resumes an interrupted
run. "learned-optim train --schema" prints the JSON Schema of recipe files."""


@dataclass(frozen=True)
class Schema:
    """Print the JSON Schema of recipe files."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    """The configuration of the recipe, or of all recipes if none is given.

    Raises:
        ValueError: no such recipe or update rule, or an option before the recipe.
    """
    from learned_optim.meta.recipes import recipe_descriptions

    if list(args) == ["--schema"]:
        return "train", {"f": Schema}, []
    if args and not args[0].startswith("-"):
        rules, rest = take(args[1:], "--rule")
        config = configuration(args[0], rules[-1] if rules else None)
        options = {"f": type(config), "default": config, "description": DESCRIPTION}
        return f"train {args[0]}", options, rest
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


def configuration(source: str, rule: str | None) -> AnyConfig:
    """The configuration of a training by a recipe, with another update rule if one is given."""
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.recipes import EvolutionRecipe, load_recipe, rule_config
    from learned_optim.meta.trainer import TrainConfig

    recipe, folder = load_recipe(source), run_folder(source)
    if rule is not None:
        recipe = replace(recipe, rule=rule_config(rule))
    if isinstance(recipe, EvolutionRecipe):
        return EvolutionTrainConfig(recipe=recipe, folder=folder)
    return TrainConfig(recipe=recipe, folder=folder)


def run_folder(source: str) -> Path:
    """The run folder of a recipe: the folder that the recipe is from, if that is a run folder."""
    from learned_optim.meta.run_folder import RunFolder

    path = Path(source)
    folder = path if path.is_dir() else path.parent if path.name == "recipe.json" else None
    if folder is not None and RunFolder.is_one(folder):
        return folder
    return Path("runs") / (folder.resolve().name if folder is not None else path.stem)


def run(config: AnyConfig | Schema) -> int:
    """Train by the method of the recipe."""
    import json

    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.recipes import recipe_schema

    if isinstance(config, Schema):
        print(json.dumps(recipe_schema(), indent=2))
        return 0
    if isinstance(config, EvolutionTrainConfig):
        return _run_evolution(config)
    return _run_training(config)


def _run_training(config: TrainConfig) -> int:
    import torch
    import torch.distributed as dist

    from learned_optim.checkpoint import check_writable
    from learned_optim.meta.ranks import process_group
    from learned_optim.meta.trainer import MetaTrainer

    torch.set_num_threads(config.threads)
    if config.output is not None:
        check_writable(config.output)
    with process_group():
        first = not dist.is_initialized() or dist.get_rank() == 0
        with ProgressBar("meta-training") if first else nullcontext() as show:
            trainer = MetaTrainer(
                config.recipe,
                config.folder,
                config.data,
                config.tensorboard,
                against_adamw=config.against_adamw,
            )
            path = None
            if show is None:
                trainer.train()
            else:
                shown = TrainingProgress(trainer, show)
                trainer.train(shown.on_run, shown.report)
                path = trainer.finish(config.output, shown.report)
        if path is not None:
            print(_figures(trainer, path))
            print(f"wrote {path}")
    return 0


def _run_evolution(config: EvolutionTrainConfig) -> int:
    import torch
    import torch.distributed as dist

    from learned_optim.checkpoint import check_writable
    from learned_optim.meta.evolution import EvolutionTrainer
    from learned_optim.meta.evolution_validation import ratio_to_adamw
    from learned_optim.meta.progress import pace_text

    if dist.is_torchelastic_launched():
        raise ValueError(
            "evolution strategies share work among processes of one machine: start them without "
            "torchrun, with --workers"
        )
    torch.set_num_threads(1)  # every worker has a core of its own
    if config.output is not None:
        check_writable(config.output)
    recipe = config.recipe
    with ProgressBar("meta-training") as show:
        trainer = EvolutionTrainer(
            recipe, config.folder, config.workers, config.data, config.tensorboard
        )
        pace: float | None = None

        def tell(what: str) -> None:
            validation = trainer.last_validation()
            said = pace_text(pace, ratio_to_adamw(validation) if validation else None)
            show(trainer.meta_steps, recipe.meta_steps, ", ".join([what] + [said] * bool(said)))

        def on_step(metrics: dict[str, Any]) -> None:
            nonlocal pace
            pace = metrics["runs_per_second"]
            tell(f"meta-step {metrics['meta_step']}")

        def report(what: str, done: int, total: int) -> None:
            tell(f"{what} {done}/{total}")

        tell("starting")
        if config.references_only:
            trainer.compute_references(report)
            return 0
        trainer.train(on_step, report)
        path = trainer.finish(config.output)
    validation = trainer.last_validation()
    if validation is not None:
        average = validation["average"]
        print(
            f"final loss on {recipe.validation_tasks} validation tasks: "
            f"{math.exp(average['mean']):.3f} of tuned AdamW's (geometric mean), median "
            f"{math.exp(average['median']):.3f}; ahead on {average['share_ahead']:.0%}"
        )
    print(f"wrote {path}")
    return 0


def _figures(trainer: MetaTrainer, path: Path) -> str:
    """What came of a training, in a line."""
    from learned_optim.pretrained import load_record

    record, recipe = load_record(path), trainer.recipe
    test = record["test"]
    steps = recipe.validation_horizon or recipe.horizon
    if recipe.validation_mean == "geometric":
        tested = f"{_number(test['geometric_mean'])} (geometric means)"
    else:
        tested = f"{_number(test['mean'])} ± {_number(test['std'])}"
    of = f" of {recipe.test_task}" if recipe.test_task else ""
    ratio = record["ratio_to_adamw"]
    against = "" if ratio is None else f"{ratio:.2f} of tuned AdamW's, "
    return (
        f"loss summed over {steps} steps: validation {_number(record['validation'])} ({against}"
        f"best epoch {record['epoch']} of {record['epochs_run']}), test on {test['runs']} fresh "
        f"runs{of} {tested}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
