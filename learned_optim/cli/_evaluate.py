"""``learned-optim evaluate``: learned optimizers against tuned hand-written ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learned_optim.cli._progress import ProgressBar

DESCRIPTION = """Compare learned optimizers, untuned, with hand-written ones tuned for each task.

Writes tables and plots. Run again, the same command does only the missing runs.
"--suite field" evaluates on the field, real training runs."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    from learned_optim.evaluation import EvaluateConfig

    return "evaluate", {"f": EvaluateConfig, "description": DESCRIPTION}, args


def run(config: Any) -> int:
    """Run what is missing and write the report."""
    from learned_optim.checkpoint import check_writable
    from learned_optim.evaluation import Evaluation, brief, write_report

    with ProgressBar("evaluation") as show:
        evaluation = Evaluation(config, show)
        check_writable(config.output / "table.md")
        summary = evaluation.execute()
    print(f"{brief(summary)}\n")
    for path in write_report(summary, config.output):
        print(f"wrote {path}")
    return 0
