"""``learned-optim explain``: a report on what a checkpoint's update rule does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class Explain:
    """Write a report with plots on what a checkpoint's update rule does."""

    checkpoint: tyro.conf.Positional[str]
    """A shipped name, a file, a run folder or a Hub id."""
    output: Path | None = None
    """Folder of the report; runs/explain-CHECKPOINT if not given."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    return "explain", {"f": Explain}, args


def run(config: Explain) -> int:
    """Write the report, and print where it is.

    Raises:
        ValueError: there is no checkpoint of that name.
        OSError: a file does not exist, or cannot be read or written.
    """
    from learned_optim.explain import explain

    report = explain(
        config.checkpoint,
        config.output or Path("runs") / f"explain-{Path(config.checkpoint).stem}",
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report)
    return 0
