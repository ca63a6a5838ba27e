"""``learned-optim evaluate``: learned optimizers against tuned hand-written ones."""

from __future__ import annotations

from dataclasses import dataclass

from learned_optim._progress import ProgressBar
from learned_optim.checkpoint import check_writable
from learned_optim.evaluation import EvaluateConfig, Evaluation, brief, write_report


@dataclass(frozen=True)
class Evaluate(EvaluateConfig):
    """Compare learned optimizers, untuned, with hand-written ones tuned for each task.

    Writes tables and plots. Run again, the same command does only the missing runs.
    "--suite field" evaluates on the field, real training runs.
    """

    def run(self) -> int:
        with ProgressBar("evaluation") as show:
            evaluation = Evaluation(self, show)
            check_writable(self.output / "table.md")
            summary = evaluation.execute()
        print(f"{brief(summary)}\n")
        for path in write_report(summary, self.output):
            print(f"wrote {path}")
        return 0
