"""The ``learned-optim`` command.

Commands are argparse's, one module each, in the table of :mod:`learned_optim.cli._commands`; their
options come from the configurations' dataclasses (:mod:`learned_optim.cli._options`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from learned_optim.cli._commands import COMMANDS, run
from learned_optim.cli._progress import ProgressBar, TrainingProgress

__all__ = ["ProgressBar", "TrainingProgress", "main"]

#: Modules that the package is installed without unless asked, by the extra they come with.
EXTRAS = {
    "meta": (
        "filelock", "matplotlib", "numpy", "scipy", "shtab", "sklearn", "tensorboard", "tomli",
        "torchvision", "tqdm",
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    Raises:
        SystemExit: with status 2, of arguments that do not parse.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    # As under `python -m`: tasks of one's own, "my_tasks:name", may lie in the current folder.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        status = _reported(args)
        sys.stdout.flush()  # now, where a closed pipe can still be caught
        return status
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nlearned-optim: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        sys.path.remove(here)


def _reported(args: list[str]) -> int:
    """Run a command; what goes wrong is a line on standard error."""
    try:
        return run(args)
    except SystemExit as end:  # argparse's way to end after --help, and after a usage error
        if end.code:
            raise
        return 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"learned-optim: {_message(error, args)}", file=sys.stderr)
        return 1


def _message(error: Exception, args: list[str]) -> str:
    """What went wrong; for a missing package of an extra, how to get it."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if isinstance(error, ImportError) and missing in modules:
            command = next((arg for arg in args if arg in COMMANDS), args[0])
            return f"{command} needs {missing}: pip install 'learned-optim[{extra}]'"
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return str(error.strerror)  # without "[Errno 28]"
    return str(error)
