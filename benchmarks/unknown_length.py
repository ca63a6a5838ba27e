"""Learned optimizers that are never told the length of the run, against tuned constant rates.

    python -m benchmarks.unknown_length [--workers 2]   # resumable

The field's tasks for the steps of its quick tier. A user who does not know how long a run will be
cannot anneal; the rivals are then hand-written optimizers at a constant learning rate, each tuned
per task over the field's rates as there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.checkpoint import write_text
from learned_optim.cli import ProgressBar
from learned_optim.meta import field_report
from learned_optim.meta.field import FieldConfig, FieldEvaluation
from learned_optim.meta.runs import OptimizerSpec
from learned_optim.pretrained import ALIASES, checkpoint_path, load_rule

RESULT = Path(__file__).parent.parent / "docs" / "results" / "unknown-length.json"
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
    started = time.perf_counter()
    with ProgressBar("unknown length") as show:
        evaluation = FieldEvaluation(config, show)
        path = str(checkpoint_path(checkpoint))
        identity = f"{load_rule(path).fingerprint()}-untold"
        evaluation.optimizers[0] = Untold(checkpoint, "learned", path, identity)
        summary = evaluation.execute()
    summary["seconds"] = time.perf_counter() - started
    write_text(RESULT, json.dumps(summary, separators=(",", ":")) + "\n")
    print(table())


def table(path: Path | None = None) -> str:
    """Against the best constant rate, over all tasks and by task."""
    path = path or RESULT
    if not path.exists():
        return "Not measured yet."
    summary = json.loads(path.read_text())
    return f"{field_report.tuned_table(summary)}\n\n{field_report.ratios_table(summary)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=ALIASES["default"])
    parser.add_argument("--output", type=Path, default=Path("runs/results-unknown-length"))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    measure(args.checkpoint, args.output, args.workers)


if __name__ == "__main__":
    main()
