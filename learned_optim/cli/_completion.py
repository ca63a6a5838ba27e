"""Shell completion: shtab's script for the parser of everything."""

from __future__ import annotations

import argparse
from pathlib import Path


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script that completes the command in ``shell``.

    Args:
        shell: one of those that shtab knows.
        parser: of everything; it parses nothing any more afterwards.

    Raises:
        ValueError: shtab does not know the shell.
        ImportError: there is no shtab, which the ``meta`` extra brings.
    """
    import shtab

    from learned_optim._discovery import unknown_name

    if shell not in shtab.SUPPORTED_SHELLS:
        raise unknown_name("shell", shell, list(shtab.SUPPORTED_SHELLS))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _add_values(command)
    text: str = shtab.complete(parser, shell=shell)
    return text


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Say what values arguments complete to: names that ship, or files."""
    import shtab

    from learned_optim.meta.baselines import BASELINES
    from learned_optim.meta.recipes import recipes
    from learned_optim.meta.tasks import task_names
    from learned_optim.pretrained import list_pretrained
    from learned_optim.rules import rule_names

    names = {
        "source": list(recipes()),
        "checkpoints": list_pretrained(),
        "tasks": task_names(),
        "recipe.task": task_names(),
        "baselines": list(BASELINES),
        "rule": rule_names(),
    }
    for action in parser._actions:
        if action.dest in names:
            action.choices = names[action.dest]
        elif action.metavar == "PATH" or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
