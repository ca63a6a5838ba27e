"""``learned-optim search``: the meta-learning rate of a recipe, and any other field."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from learned_optim.cli import _recipes
from learned_optim.cli._options import parsed
from learned_optim.cli._parser import Parser, paragraph
from learned_optim.cli._progress import ProgressBar

HELP = "random search of a recipe's meta-learning rate"

EXAMPLES = """examples:
  learned-optim search quick --trials 8
"""


def configure(parser: Parser, args: Sequence[str]) -> None:
    from learned_optim.meta.search import SearchConfig

    parser.description = paragraph(
        "Tries random meta-learning rates on short runs of a recipe and prints the best."
    )
    parser.epilog = EXAMPLES
    _recipes.configure(parser, "search", args, SearchConfig, None)


def run(options: argparse.Namespace) -> int:
    """Search, and print the trials as they finish."""
    if _recipes.no_recipe(options):
        return 2
    from learned_optim.meta.search import Trial, search

    config = parsed(options, options.template)
    import torch

    torch.set_num_threads(config.threads)
    found: list[Trial] = []
    runs = config.trial_epochs * config.recipe.runs_per_epoch
    with ProgressBar("search") as show:

        def on_run(done: int) -> None:
            tried = [t for t in found if t.validation < float("inf")]
            best = min(tried, key=lambda t: t.validation, default=None)
            said = f" best {best.validation:.2f} at {best.meta_lr:g}" if best else ""
            trial = min(len(found) + 1, config.trials)
            show(len(found) * runs + done, config.trials * runs, f"trial {trial}{said}")

        def on_trial(trial: Trial) -> None:
            found.append(trial)
            figure = f"{trial.validation:.2f}" if trial.validation < float("inf") else "diverged"
            print(f"{trial.meta_lr:<10g}{figure}", flush=True)
            on_run(0)

        on_run(0)
        trials = search(config, on_trial, on_run)
    print(f"best: --meta-lr {trials[0].meta_lr:g} (validation {trials[0].validation:.2f})")
    return 0
