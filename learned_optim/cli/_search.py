"""``learned-optim search``: the meta-learning rate of a recipe, and any other field."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from learned_optim.cli import _recipes
from learned_optim.cli._options import parsed
from learned_optim.cli._parser import Parser, paragraph
from learned_optim.cli._progress import ProgressBar

HELP = "search for a recipe's meta-learning rate, and other fields"

EXAMPLES = """examples:
  learned-optim search quick --trials 8
  learned-optim search quick --trials 30 --workers 2 --space truncation=int:10:40
"""


def configure(parser: Parser, args: Sequence[str]) -> None:
    from learned_optim.meta.search import SearchConfig

    parser.description = paragraph(
        "Tries meta-learning rates, and values of other fields, on short runs of a recipe and "
        "prints the best. Given again, the same command goes on with an interrupted search."
    )
    parser.epilog = EXAMPLES
    _recipes.configure(parser, "search", args, SearchConfig, None)


def run(options: argparse.Namespace) -> int:
    """Search, and print the trials as they finish."""
    if _recipes.no_recipe(options):
        return 2
    from learned_optim.meta.search import Trial, search

    config = parsed(options, options.template)
    import optuna
    import torch

    del optuna  # missed now, before the bar
    torch.set_num_threads(config.threads)
    found: list[Trial] = []
    runs = config.trial_epochs * config.recipe.runs_per_epoch
    flags = {dimension.name: dimension.flag for dimension in config.dimensions()}

    def settings(trial: Trial) -> str:
        return " ".join(f"{flags[name]} {shown(value)}" for name, value in trial.values.items())

    def shown(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    with ProgressBar("search") as show:

        def on_run(done: int) -> None:
            best = min(found, key=lambda t: t.validation, default=None)
            said = f" best {best.validation:.2f}" if best and best.validation < math.inf else ""
            trial = min(len(found) + 1, config.trials)
            show(len(found) * runs + done, config.trials * runs, f"trial {trial}{said}")

        def on_trial(trial: Trial) -> None:
            found.append(trial)
            figure = f"{trial.validation:.2f}" if trial.validation < math.inf else "diverged"
            print(f"{settings(trial)}  {figure}{' (pruned)' * trial.pruned}", flush=True)
            on_run(0)

        on_run(0)
        trials = search(config, on_trial, on_run)
    print(f"best: {settings(trials[0])} (validation {trials[0].validation:.2f})")
    return 0
