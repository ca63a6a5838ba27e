"""``learned-optim evaluate``: learned optimizers against tuned, hand-written ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from learned_optim.cli._options import add_fields, parsed
from learned_optim.cli._parser import Parser, paragraph, peek
from learned_optim.cli._progress import ProgressBar

HELP = (
    "compare learned with tuned hand-written optimizers; with --suite field, on real training "
    "runs, against tuned schedules and rivals that need no tuning"
)

#: What is run: tasks and horizons as asked for, or the field of real training runs.
SUITES = ("tasks", "field")

EXAMPLES = """examples:
  learned-optim evaluate --checkpoints default runs/quick --tasks digits
  learned-optim evaluate --suite field --quick
"""


def configure(parser: Parser, args: Sequence[str]) -> None:
    """Add the options of the suite that ``args`` ask for.

    Raises:
        ValueError: there is no such suite.
    """
    from learned_optim.meta.evaluate import EvaluateConfig
    from learned_optim.meta.field import FieldConfig

    suite = peek(args, "--suite", f"one of {', '.join(SUITES)}") or SUITES[0]
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    config = FieldConfig() if suite == "field" else EvaluateConfig()
    everything = "--help-all" in args
    parser.usage = "learned-optim evaluate [options]"
    parser.description = paragraph(
        "Runs learned optimizers, untuned, against hand-written ones tuned for each task, and "
        "writes tables and learning curves. Given again, the same command does only the runs that "
        "are missing."
    )
    parser.epilog = EXAMPLES
    parser.set_defaults(template=config)
    parser.add_argument("--help-all", action="help", help="where data is looked for, as well")
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="what is run: tasks and horizons as asked for, or the field of real training runs, "
        "which has options of its own (tasks)",
    )
    add_fields(parser, config)
    group = parser.add_argument_group("data")
    add_fields(group, config.data, path="data.", shown=None if everything else ())


def run(options: argparse.Namespace) -> int:
    """Run what is missing and write the report."""
    from learned_optim.checkpoint import check_writable
    from learned_optim.meta import field, field_report, report
    from learned_optim.meta.evaluate import Evaluation

    config = parsed(options, options.template)
    summary: dict[str, Any]
    if isinstance(config, field.FieldConfig):
        _import_plotting()
        with ProgressBar("field") as show:
            measured = field.FieldEvaluation(config, show)
            check_writable(config.output / "table.md")
            summary = measured.execute()
        print(field_report.brief(summary))
        written = field_report.write_report(summary, config.output)
    else:
        _import_plotting()
        with ProgressBar("evaluation") as show:
            evaluation = Evaluation(config, show)
            check_writable(config.output / "table.md")
            summary = evaluation.execute()
        print(report.brief(summary))
        written = report.write_report(summary, config.output)
    for path in written:
        print(f"wrote {path}")
    return 0


def _import_plotting() -> None:
    """Tables and plots come last: what they need is missed now, not after hours of runs."""
    import matplotlib
    import scipy

    del matplotlib, scipy
