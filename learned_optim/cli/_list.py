"""``learned-optim list``: the names that commands take."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class List:
    """Print the shipped checkpoints, update rules, tasks, recipes and baselines."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    return "list", {"f": List}, args


def run(config: List) -> int:
    """Print the lists."""
    from learned_optim.evaluation.baselines import BASELINES
    from learned_optim.meta.recipes import recipe_descriptions
    from learned_optim.meta.tasks import described_families
    from learned_optim.pretrained import ALIASES, list_pretrained
    from learned_optim.rules import rule_class, rule_names

    recipes = recipe_descriptions()
    shipped = {
        name: f"stands for {ALIASES[name]}" if name in ALIASES else recipes.get(name, "")
        for name in list_pretrained()
    }
    tasks: list[str] = []
    for about, names in described_families().items():
        tasks += [f"  {about}", *_names(names, 6)]
    groups = {
        "checkpoints": _described(shipped),
        "update rules": _described(
            {name: (rule_class(name).__doc__ or "").partition("\n")[0] for name in rule_names()}
        ),
        "tasks": tasks,
        "recipes": _described(
            {n: "of the checkpoint" if n in shipped else text for n, text in recipes.items()}
        ),
        "baselines": _names(BASELINES, 2),
    }
    print("\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in groups.items()))
    return 0


def _described(texts: Mapping[str, str]) -> list[str]:
    """Lines of names with their descriptions."""
    left = 2 + max(map(len, texts)) + 2
    return [
        line
        for name, text in texts.items()
        for line in _wrapped(text.replace("`", ""), f"  {name}".ljust(left), " " * left)
    ]


def _names(names: Iterable[str], indent: int) -> list[str]:
    return _wrapped(", ".join(names), " " * indent, " " * indent)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    width = max(60, min(100, shutil.get_terminal_size().columns))
    return textwrap.wrap(
        text or "(no description)",
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
    )
