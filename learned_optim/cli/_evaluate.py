"""``learned-optim evaluate``: learned optimizers against tuned hand-written ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learned_optim._discovery import unknown_name
from learned_optim.cli._arguments import take
from learned_optim.cli._progress import ProgressBar

DESCRIPTION = """Compare learned optimizers, untuned, with hand-written ones tuned for each task.

Writes tables and learning curves. Run again, the same command does only the missing runs.
"--suite field" evaluates on the field, real training runs, and has options of its own."""


def options(args: Sequence[str]) -> tuple[str, dict[str, Any], Sequence[str]]:
    """The configuration of the suite that is evaluated.

    Raises:
        ValueError: there is no such suite.
    """
    from learned_optim.meta.evaluate import EvaluateConfig
    from learned_optim.meta.field import FieldConfig

    suites: dict[str, Any] = {"tasks": EvaluateConfig, "field": FieldConfig}
    given, args = take(args, "--suite")
    suite = given[-1] if given else "tasks"
    if suite not in suites:
        raise unknown_name("suite", suite, list(suites))
    return "evaluate", {"f": suites[suite], "description": DESCRIPTION}, args


def run(config: Any) -> int:
    """Run what is missing and write the report."""
    from learned_optim.checkpoint import check_writable
    from learned_optim.meta import field, field_report, report
    from learned_optim.meta.evaluate import Evaluation

    of_field = isinstance(config, field.FieldConfig)
    with ProgressBar("evaluation") as show:
        measured: Any = (field.FieldEvaluation if of_field else Evaluation)(config, show)
        check_writable(config.output / "table.md")
        summary = measured.execute()
    reporter: Any = field_report if of_field else report
    print(reporter.brief(summary))
    for path in reporter.write_report(summary, config.output):
        print(f"wrote {path}")
    return 0
