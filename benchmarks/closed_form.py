"""How much of the default survives in a formula: both on the field, against a tuned AdamW.

    learned-optim explain general-4 --formula runs/closed-form-general-4.safetensors
    python -m benchmarks.closed_form [--workers 2]      # resumable

Tasks, steps and seeds are those of the field's quick tier, or what `--tasks` and `--seeds` say.
With `--output runs/results-field-quick`, runs of `python -m benchmarks.results field --quick` are
not done again. The formula runs in PyTorch, several times slower than the compiled network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import on_field
from learned_optim.meta import field_report
from learned_optim.meta.field import FieldConfig
from learned_optim.meta.tasks import field_tasks
from learned_optim.pretrained import ALIASES
from learned_optim.summary import ratio_text

RESULT = on_field.RESULTS / "closed-form.json"
# What a user would take without tuning; gains are measured from it.
UNTUNED = "adamw-cosine-1e-3"
RIVALS = ("adamw-cosine", UNTUNED)


def measure(
    checkpoint: str, output: Path, workers: int, tasks: Sequence[str] = (), seeds: int = 0
) -> None:
    """Run what is missing in ``output``, and write the summary."""
    formula = Path("runs") / f"closed-form-{checkpoint}.safetensors"
    if not formula.exists():
        raise SystemExit(
            f"{formula} does not exist: learned-optim explain {checkpoint} --formula {formula}"
        )
    config = FieldConfig(
        checkpoints=(checkpoint, str(formula)),
        tasks=tuple(tasks),
        baselines=RIVALS,
        quick=True,
        seeds=seeds,
        output=output,
        workers=workers,
    )
    on_field.execute(config, "closed form", RESULT)
    print(table())


def in_words(summary: dict[str, Any]) -> str:
    """The formula's place, and the share of the network's gain that it keeps."""
    network, formula = summary["protocol"]["checkpoints"]
    overall, pairs, tasks = summary["overall"], summary["untuned_pairs"], summary["tasks"]
    gains = [-math.log(pairs[name][UNTUNED]["mean"]) for name in (formula, network)]
    ratios = {
        task: entry["optimizers"][formula]["final"]["mean"]
        / entry["optimizers"][network]["final"]["mean"]
        for task, entry in tasks.items()
    }
    close = sum(abs(math.log(ratio)) <= math.log(1.05) for ratio in ratios.values())
    far = sorted((task for task in ratios if ratios[task] > 1.2), key=lambda t: -ratios[t])
    worst = ", ".join(f"`{task}` ({ratios[task]:.2f})" for task in far) or "none"
    rest = "" if len(tasks) == len(field_tasks()) else " The other tasks have not been run."
    return (
        f"Over {len(tasks)} of the field's {len(field_tasks())} tasks (quick tier, test seeds: "
        f"{summary['protocol']['seeds']}), the formula's final loss is "
        f"{ratio_text(overall[formula]['ratio'])} times that of AdamW with a cosine tuned per "
        f"task, where the network's is {ratio_text(overall[network]['ratio'])}; it is "
        f"{ratio_text(pairs[formula][network])} times the network's, within 5 % of it on {close} "
        f"tasks, and more than a fifth above it on: {worst}. Against AdamW with a cosine from "
        f"1e-3, untuned as it is, its ratio is {ratio_text(pairs[formula][UNTUNED])} and the "
        f"network's {ratio_text(pairs[network][UNTUNED])}: of the network's gain there, in log "
        f"loss, the formula keeps {gains[0] / gains[1]:.0%}.{rest}"
    )


def table(path: Path | None = None) -> str:
    """In words, over all tasks, and by task."""

    def text(summary: dict[str, Any]) -> str:
        parts = (in_words(summary), field_report.tuned_table(summary),
                 field_report.ratios_table(summary))  # fmt: skip
        return "\n\n".join(parts)

    return on_field.shown(path or RESULT, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=ALIASES["default"])
    parser.add_argument("--output", type=Path, default=Path("runs/results-closed-form"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=(), help="of the field; all if not given")
    parser.add_argument("--seeds", type=int, default=0, help="test seeds; the tier's if not given")
    options = parser.parse_args()
    measure(options.checkpoint, options.output, options.workers, options.tasks, options.seeds)


if __name__ == "__main__":
    main()
