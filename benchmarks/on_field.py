"""What benchmarks share that run a checkpoint by the field's protocol."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learned_optim.checkpoint import write_text
from learned_optim.cli import ProgressBar
from learned_optim.meta.field import FieldConfig, FieldEvaluation
from learned_optim.pretrained import ALIASES

RESULTS = Path(__file__).parent.parent / "docs" / "results"
NOT_MEASURED = "Not measured yet."


def keep(summary: dict[str, Any], path: Path) -> None:
    """Write a summary to docs/results/."""
    write_text(path, json.dumps(summary, separators=(",", ":")) + "\n")


def execute(config: FieldConfig, what: str, path: Path) -> None:
    """Run what is missing in the configuration's folder, and write the summary to ``path``."""
    with ProgressBar(what) as show:
        keep(FieldEvaluation(config, show).execute(), path)


def shown(path: Path, text: Callable[[dict[str, Any]], str]) -> str:
    """The text of a kept summary, or that there is none."""
    return text(json.loads(path.read_text())) if path.exists() else NOT_MEASURED


def main(doc: str | None, name: str, measure: Callable[[str, Path, int], None]) -> None:
    """Command line of a benchmark.

    Args:
        doc: what ``--help`` says.
        name: of the folder under ``runs/`` for single runs.
        measure: takes a checkpoint, the folder and the number of workers.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=ALIASES["default"])
    parser.add_argument("--output", type=Path, default=Path("runs") / f"results-{name}")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    measure(args.checkpoint, args.output, args.workers)
