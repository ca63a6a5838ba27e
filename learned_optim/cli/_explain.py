"""``learned-optim explain``: a report on what a checkpoint's update rule does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from learned_optim.cli._parser import Parser, paragraph

HELP = "a report with plots on what a checkpoint's update rule does"


def configure(parser: Parser, args: Sequence[str]) -> None:
    parser.usage = "learned-optim explain CHECKPOINT [options]"
    parser.description = paragraph(
        "Writes a report with plots on what a checkpoint's update rule does: what its update "
        "depends on, how it answers impulses, and what its inputs are worth."
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a shipped name, a file, a run folder or a Hub id",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder of the report (runs/explain-CHECKPOINT)",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="leave out impulse responses and ablation",
    )


def run(options: argparse.Namespace) -> int:
    """Write the report, and print where it is.

    Raises:
        ValueError: not exactly one checkpoint, or none of that name.
        OSError: no such file, or it cannot be read or written.
        ImportError: no matplotlib, which the ``meta`` extra brings.
    """
    if len(options.checkpoints) != 1:
        raise ValueError(
            "explain takes one checkpoint: a shipped name, a file, a run folder or a Hub id"
        )
    (source,) = options.checkpoints
    from learned_optim.explain import explain

    report = explain(
        source,
        options.output or Path("runs") / f"explain-{Path(source).stem}",
        short=options.short,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report)
    return 0
