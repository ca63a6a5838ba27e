"""The table of commands, and the parser that is made of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from learned_optim._discovery import did_you_mean
from learned_optim.cli import _completion, _evaluate, _explain, _list, _show, _train
from learned_optim.cli._parser import Parser

EXAMPLES = """examples:
  learned-optim train quick                     meta-train in two minutes
  learned-optim show runs/quick                 look at what came of it
  learned-optim evaluate --checkpoints runs/quick --tasks digits

COMMAND --help shows its most common options, COMMAND --help-all every option, by group.
"""


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        help: its line in the list of commands.
        configure: adds its arguments to a parser, given what the command line has after the
            command: a recipe, say, decides which options there are, and ``--help-all`` which ones
            help shows.
        run: does the work on the parsed arguments and returns the exit status.
    """

    help: str
    configure: Callable[[Parser, Sequence[str]], None]
    run: Callable[[argparse.Namespace], int]


#: Subcommands by name. Their modules import torch and the like where they use them, so that help
#: comes at once and a missing extra is named.
COMMANDS: dict[str, Command] = {
    "list": Command(_list.HELP, _list.configure, _list.run),
    "show": Command(_show.HELP, _show.configure, _show.run),
    "train": Command(_train.HELP, _train.configure, _train.run),
    "evaluate": Command(_evaluate.HELP, _evaluate.configure, _evaluate.run),
    "explain": Command(_explain.HELP, _explain.configure, _explain.run),
}


def build_parser(args: Sequence[str] | None) -> Parser:
    """The parser of the whole command line.

    Args:
        args: what it will parse. Of the command that they begin with all arguments are added, of
            others the name alone. ``None``: every argument of every command.
    """
    parser = Parser("learned-optim", usage="learned-optim COMMAND ...", epilog=EXAMPLES)
    parser.set_defaults(parser=parser)
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    parser.add_argument(
        "--rules",
        metavar="MODULE",
        help="with any command: import a module of your own that defines update rules",
    )
    parser.add_argument("--version", action="store_true", help="the version of learned_optim")
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        help="print a script that completes commands, options and names in bash, zsh and others",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", prog="learned-optim"
    )
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help)
        sub.set_defaults(parser=sub, run=command.run)
        if args is None:
            command.configure(sub, ("--help-all",))
        elif args and args[0] == name:
            command.configure(sub, args[1:])
    return parser


def run(args: list[str]) -> int:
    """Parse the arguments and do what they say; returns the exit status.

    Raises:
        SystemExit: after help, and with status 2 of arguments that do not parse.
    """
    args = _import_rules(args)
    parser = build_parser(args)
    if args and not args[0].startswith("-") and args[0] not in COMMANDS:
        return _unknown_command(args[0], parser)
    options, unknown = parser.parse_known_args(args)
    if unknown:
        options.parser.refuse(unknown)
    if options.version:
        from learned_optim import __version__

        print(f"learned-optim {__version__}")
        return 0
    if options.print_completion:
        print(_completion.script(options.print_completion, build_parser(None)), end="")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    status: int = options.run(options)
    return status


def _unknown_command(name: str, parser: Parser) -> int:
    near = did_you_mean(name, COMMANDS).removeprefix(". ")
    print(f"learned-optim: unknown command {name!r}", file=sys.stderr)
    print("\n".join([near] * bool(near) + ["", parser.format_help()]), end="", file=sys.stderr)
    return 2


def _import_rules(args: list[str]) -> list[str]:
    """The arguments without every ``--rules MODULE``, after importing the modules.

    Raises:
        ValueError: no module is named, or there is no such module.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--rules", action="append", default=[])
    try:
        options, rest = early.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError("--rules takes a module that defines update rules") from error
    if options.rules:
        from learned_optim.meta.recipes import import_rules

        for module in options.rules:
            import_rules(module)
    return rest
