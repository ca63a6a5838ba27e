"""``learned-optim train``: meta-train an update rule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learned_optim.cli import _recipes
from learned_optim.cli._options import parsed
from learned_optim.cli._parser import Parser, paragraph
from learned_optim.cli._progress import ProgressBar, TrainingProgress

if TYPE_CHECKING:
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.trainer import MetaTrainer, TrainConfig

HELP = "meta-train an update rule"

EXAMPLES = """examples:
  learned-optim train quick
  learned-optim train quick --meta-lr 0.003 --folder runs/slower
  learned-optim train my-recipe.toml --tensorboard
"""


def configure(parser: Parser, args: Sequence[str]) -> None:
    from learned_optim.meta.evolution import EvolutionTrainConfig
    from learned_optim.meta.trainer import TrainConfig

    parser.description = paragraph(
        "Meta-trains an update rule in a run folder; given again, the same command goes on with "
        "an interrupted run."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("--schema", action=PrintSchema, help="print the JSON Schema of recipes")
    if "--schema" not in args:
        _recipes.configure(parser, "train", args, TrainConfig, EvolutionTrainConfig)


class PrintSchema(argparse.Action):
    """Prints the schema of recipe files and ends, as ``--help`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        import json

        from learned_optim.meta.recipes import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        parser.exit()


def run(options: argparse.Namespace) -> int:
    """Train by the method of the recipe."""
    if _recipes.no_recipe(options):
        return 2
    from learned_optim.meta.evolution import EvolutionTrainConfig

    config = parsed(options, options.template)
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
