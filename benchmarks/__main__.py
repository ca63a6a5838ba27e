"""Makes the figures of README and the documentation.

python -m benchmarks NAME [OPTIONS]      # one of the names below; each has a --help
"""

from __future__ import annotations

import argparse
import importlib

#: Modules of this package by the name of their command.
NAMES = ("step", "cost", "memory", "gpu", "light-bench", "results", "pages", "commands")


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            description=module.__doc__,
            help=module.__doc__.splitlines()[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if hasattr(module, "add_options"):
            module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
