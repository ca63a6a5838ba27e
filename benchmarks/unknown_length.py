"""Learned optimizers that are never told the length of the run, against tuned constant rates.

    python -m benchmarks.unknown_length [--workers 2]   # resumable

The field's tasks for the steps of its quick tier. A user who does not know how long a run will be
cannot anneal; the rivals are then hand-written optimizers at a constant learning rate, each tuned
per task over the field's rates as there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks import on_field
from learned_optim import LearnedOptimizer
from learned_optim.cli import ProgressBar
from learned_optim.meta import field_report
from learned_optim.meta.field import FieldConfig, FieldEvaluation
from learned_optim.meta.runs import OptimizerSpec
from learned_optim.pretrained import checkpoint_path, load_rule

RESULT = on_field.RESULTS / "unknown-length.json"
RIVALS = ("adamw", "nesterov")


@dataclass(frozen=True)
class Untold(OptimizerSpec):
    """A learned optimizer that is not told the length of the run."""

    def make(self, params: Iterable[Tensor], lr: float, total_steps: int) -> Optimizer:
        return LearnedOptimizer(params, load_rule(self.source), lr=lr, warmup=0)


def measure(checkpoint: str, output: Path, workers: int) -> None:
    """Run what is missing in ``output``, and write the summary."""
    config = FieldConfig(
        checkpoints=(checkpoint,), baselines=RIVALS, quick=True, output=output, workers=workers
    )
    with ProgressBar("unknown length") as show:
        evaluation = FieldEvaluation(config, show)
        path = str(checkpoint_path(checkpoint))
        identity = f"{load_rule(path).fingerprint()}-untold"
        evaluation.optimizers[0] = Untold(checkpoint, "learned", path, identity)
        summary = evaluation.execute()
    on_field.keep(summary, RESULT)
    print(table())


def table(path: Path | None = None) -> str:
    """Against the best constant rate, over all tasks and by task."""

    def text(summary: dict[str, Any]) -> str:
        return f"{field_report.tuned_table(summary)}\n\n{field_report.ratios_table(summary)}"

    return on_field.shown(path or RESULT, text)


if __name__ == "__main__":
    on_field.main(__doc__, "unknown-length", measure)
