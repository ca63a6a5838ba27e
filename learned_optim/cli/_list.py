"""``learned-optim list``: what ships, by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from learned_optim.cli._options import entry, listing, section
from learned_optim.cli._parser import Parser, paragraph

HELP = "shipped checkpoints, update rules, tasks, recipes and baselines"


def configure(parser: Parser, args: Sequence[str]) -> None:
    parser.usage = "learned-optim list"
    parser.description = paragraph(
        "Prints the names of shipped checkpoints, update rules, tasks, recipes and baselines, and "
        "what they are."
    )
    parser.add_argument("extra", nargs="*", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Print the lists.

    Raises:
        ValueError: there are arguments.
    """
    if options.extra:
        raise ValueError(f"list takes no arguments, got {' '.join(options.extra)}")
    from learned_optim.meta.baselines import BASELINES
    from learned_optim.meta.recipes import recipe_descriptions
    from learned_optim.meta.tasks import described_families
    from learned_optim.rules import rule_class, rule_names

    def lines(described: dict[str, str]) -> list[str]:
        return [line for name, text in described.items() for line in entry(name, text)]

    rules = {name: (rule_class(name).__doc__ or "").partition("\n")[0] for name in rule_names()}
    tasks: list[str] = []
    for about, names in described_families().items():
        tasks += [f"  {about}", *listing(names, 6)]
    groups = {
        "checkpoints": lines(_shipped()),
        "update rules": lines(rules),
        "tasks": tasks,
        "recipes": lines(recipe_descriptions()),
        "baselines": listing(BASELINES),
    }
    print("".join(section(*group) for group in groups.items()).lstrip("\n"), end="")
    return 0


def _shipped() -> dict[str, str]:
    """What the shipped checkpoints are, by name; aliases first."""
    from learned_optim.pretrained import ALIASES, list_pretrained, load_record, load_rule

    found = {alias: f"stands for {name}" for alias, name in ALIASES.items()}
    for name in list_pretrained():
        if name not in ALIASES:
            recipe = load_record(name).get("recipe", {})
            whole = "whole runs of the mixture " if recipe.get("method") == "evolution" else ""
            task = f"{whole}{recipe.get('task', 'an unknown task')!r}"
            found[name] = f"update rule {load_rule(name).name!r}, meta-trained on {task}"
    return {name: text for name, text in found.items() if name in list_pretrained()}
