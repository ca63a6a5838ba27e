"""The ``learned-optim`` command: tyro makes options and help from dataclasses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from learned_optim._extras import META, how_to_install

__all__ = ["main"]

#: Help of the commands. The module of a command is imported when the command is given: the help of
#: all commands does not wait for torch.
COMMANDS = {
    "list": "Print the shipped checkpoints, update rules, tasks, recipes and baselines.",
    "show": "Print what a checkpoint is and how it was trained.",
    "train": "Meta-train an update rule by a recipe; resumes an interrupted run.",
    "evaluate": "Compare learned optimizers with tuned hand-written ones.",
    "explain": "Write a report with plots on what an update rule does.",
}

#: Packages that a command needs after hours of computing. It looks for them before.
NEEDS = {
    "train": ("tqdm", "filelock"),
    "evaluate": ("tqdm", "scipy", "matplotlib"),
    "explain": ("matplotlib",),
}

DESCRIPTION = """Meta-train, evaluate and inspect learned optimizers.

`learned-optim COMMAND --help` describes a command; `learned-optim --version` prints the version;
`--rules MODULE`, with any command, imports a module that defines update rules."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the process if not given.

    Returns:
        The exit status: 0, 1 after an error, 2 after a usage error, 130 after Ctrl-C, 141 if the
        reader of the output closed the pipe.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    # As under `python -m`: a task "my_tasks:name" may lie in the current folder.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        status = _run(args)
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nlearned-optim: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, argparse.ArgumentError) as error:
        print(f"learned-optim: {_message(error, args)}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(here)


def _run(args: list[str]) -> int:
    modules, args = _take(args, "--rules")
    for module in modules:
        from learned_optim.meta.recipes import import_rules

        import_rules(module)
    if args == ["--version"]:
        from learned_optim import __version__

        print(f"learned-optim {__version__}")
        return 0
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command = _parse(args or ["--help"])
    except SystemExit as end:
        if end.code:
            print(f"learned-optim: {_one_line(errors.getvalue())}", file=sys.stderr)
        return 2 if end.code or not args else 0
    status: int = command.run()
    return status


def _parse(args: list[str]) -> Any:
    """The command with its options.

    Raises:
        SystemExit: after help, and with status 2 after a usage error on standard error.
    """
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    name = args[0]
    if name in COMMANDS:
        missing = [p for p in NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing and not {"-h", "--help"} & set(args):
            raise ModuleNotFoundError(name=missing[0])
        prog, options, rest = _options(name, args[1:])
        return tyro.cli(**options, prog=f"learned-optim {prog}", args=rest, config=config)
    # Help or a misspelt command: one parser of all commands, without their options.
    empty = {name: dataclasses.make_dataclass(name, [])() for name in COMMANDS}
    every = tyro.extras.subcommand_type_from_defaults(empty, COMMANDS)
    tyro.cli(every, prog="learned-optim", description=DESCRIPTION, args=args, config=config)
    raise AssertionError(f"{args} parse, though they begin with no command")


def _take(args: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Values of an option that decides on other options; the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, action="append", default=[], dest="values")
    found, rest = parser.parse_known_args(args)
    return found.values, rest


def _options(name: str, args: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Name, options of tyro and remaining arguments of a command."""
    if name == "train":
        from learned_optim.cli import _train

        rules, args = _take(args, "--rule")
        return _train.options(args, rules[-1] if rules else None)
    from learned_optim.cli import _commands

    return name, {"f": getattr(_commands, name.capitalize())}, args


def _one_line(box: str) -> str:
    """The text of tyro's error box, without title and suggested options' help."""
    box = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", box)  # colours and borders
    text = " ".join(row for row in box.splitlines()[1:] if not row.startswith(" " * 8))
    text = re.sub(r"Error parsing (?!-)\S+: ", "", text)
    parts = (" ".join(part.split()) for part in re.split("[─-]{3,}", text))
    return "; ".join(filter(None, parts))


def _message(error: Exception, args: Sequence[str]) -> str:
    """The text of the error; for a missing package, the remedy."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and missing in META:
        command = next((arg for arg in args if arg in COMMANDS), "the command line")
        return f"{command} needs {missing}: {how_to_install('meta')}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return str(error.strerror)  # without "[Errno 28]"
    return str(error)
