"""argparse's parser with this package's manners: short help, ``--help-all``, nearest names."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from learned_optim._discovery import did_you_mean

#: Column in which descriptions begin.
INDENT = 30

HELP = ("-h", "--help", "--help-all")


def help_width() -> int:
    """Columns of help: as wide as the terminal, within reason."""
    return max(60, min(100, shutil.get_terminal_size().columns))


def paragraph(text: str) -> str:
    """A description's text in lines of :func:`help_width`."""
    return textwrap.fill(text, help_width())


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in :func:`help_width` columns; examples keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=INDENT, width=help_width())


class Parser(argparse.ArgumentParser):
    """A parser that knows no abbreviations and names the nearest option to a misspelt one.

    Args:
        prog: the command as it is typed.
        **kwargs: as :class:`argparse.ArgumentParser` takes them.
    """

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --seed must not mean --seeds
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(prog, **kwargs)

    def flags(self) -> list[str]:
        """Every option there is."""
        return list(self._option_string_actions)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End with a usage error that names unknown arguments, and the nearest option."""
        near = "".join(
            did_you_mean(arg.partition("=")[0], self.flags())
            for arg in unknown
            if arg.startswith("--")
        )
        self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")


def peek(args: Sequence[str], flag: str, takes: str) -> str | None:
    """The value of one option, read before the options that depend on it are known.

    Args:
        args: the arguments, most of which are for another parser.
        flag: the option.
        takes: what the error says of an option without a value.

    Raises:
        ValueError: the option is given without a value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value")
    try:
        found: str | None = parser.parse_known_args(list(args))[0].value
    except argparse.ArgumentError as error:
        raise ValueError(f"{flag} takes {takes}") from error
    return found
