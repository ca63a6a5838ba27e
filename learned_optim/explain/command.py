"""``learned-optim explain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(args: Sequence[str]) -> int:
    """Write the report that ``args`` ask for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="learned-optim explain",
        description="Write a report with plots on what a checkpoint's update rule does.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="a shipped name, a file, a run folder or a Hub id",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder of the report (runs/explain-CHECKPOINT)",
    )  # fmt: skip
    parser.add_argument(
        "--short", action="store_true",
        help="leave out impulse responses, ablation and closed form",
    )  # fmt: skip
    parser.add_argument(
        "--formula", type=Path, metavar="FILE",
        help="where the fitted closed form goes (closed-form.safetensors in the folder)",
    )  # fmt: skip
    try:
        options = parser.parse_args(list(args))
    except SystemExit as stop:  # --help, or an error that argparse has printed
        return int(stop.code or 0)
    from learned_optim.explain import explain

    name = Path(options.checkpoint).stem
    output = options.output or Path("runs") / f"explain-{name}"
    report = explain(
        options.checkpoint, output, short=options.short, formula=options.formula,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(report)
    return 0
