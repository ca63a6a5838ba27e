"""The command line of benchmarks without options: it has a help, and refuses what it is given."""

from __future__ import annotations

import argparse


def parse(doc: str | None) -> None:
    """Exit with ``doc`` if help is asked for, and with an error for anything else.

    Args:
        doc: what ``--help`` says.
    """
    argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
