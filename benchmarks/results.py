"""Evaluations behind docs/results.md: real training runs, and the thesis's short ones.

    python -m benchmarks results [GROUP ...] [--workers N]    # all groups: hours; resumable

Every group is one call of `learned-optim evaluate`. Single runs stay in runs/results-GROUP, the
summary goes to docs/results/GROUP.json. Image tasks need $LEARNED_OPTIM_DATA. The larger groups
take hours each.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import RESULTS, save, shipped
from learned_optim.cli import main as learned_optim
from learned_optim.evaluation.figures import FINAL_SHARE, final_loss
from learned_optim.evaluation.runs import Run, RunLog
from learned_optim.pretrained import ALIASES

NETWORKS = "mnist mnist-40 mnist-2layer mnist-relu fashion emnist-letters cifar10"
FOUR = "sgd nesterov rmsprop adam"
SHORT = f"--checkpoints {shipped()[0]} coordinatewise"
LARGER = (
    f"--suite field --checkpoints {shipped()[0]} --seeds 1 --lrs 3e-4 1e-3 3e-3 1e-2 "
    "--baselines adamw-cosine muon-cosine soap-cosine"
)
#: Arguments of `learned-optim evaluate` by group.
GROUPS = {
    "field": f"--suite field --checkpoints {shipped()[0]} --seeds 2 "
    "--baselines adamw-cosine muon-cosine soap-cosine nadamw-1.75e-3",
    "field-fast": f"--suite field --checkpoints {ALIASES['default-fast']} --seeds 2 "
    "--baselines adamw-cosine muon-cosine soap-cosine",
    "field-quick": f"--suite field --quick --checkpoints {shipped()[0]} "
    "--baselines adamw-cosine adamw-linear muon-cosine soap-cosine schedulefree",
    "unknown-length": f"--suite field --quick --checkpoints {shipped()[0]} --no-told "
    "--baselines adamw nesterov",
    "gpt": f"{LARGER} --tasks char-lm-gpt --steps 400",
    "larger-language": f"{LARGER} --tasks char-lm-gpt --steps 2000 "
    "--baselines adamw-cosine --lrs 1e-3 3e-3",
    "long": f"{LARGER} --tasks autoencoder tabular-classes heavy-tails --steps 20000 "
    "--baselines adamw-cosine muon-cosine --lrs 1e-3 3e-3",
    "larger-resnet": f"{LARGER} --tasks benchmarks.larger:resnet --steps 3900",
    "larger-vit": f"{LARGER} --tasks benchmarks.larger:vit --steps 3900",
    "larger-table": f"{LARGER} --tasks benchmarks.larger:table --steps 5000",
    "larger-fine-tuning": f"{LARGER} --tasks benchmarks.larger:fine-tuning --steps 2000",
    "thesis": f"{SHORT} mnist --tasks {NETWORKS} "
    f"--baselines {FOUR} adamw schedulefree",
    "thesis-200": f"{SHORT} mnist --tasks {NETWORKS} --steps 200 "
    f"--baselines {FOUR} adamw schedulefree",
    "thesis-torch": f"{SHORT} mnist --tasks {NETWORKS.replace(' ', '-torch ')}-torch "
    f"--baselines {FOUR}",
    "thesis-torch-200": f"{SHORT} mnist --tasks {NETWORKS.replace(' ', '-torch ')}-torch "
    f"--baselines {FOUR} --steps 200",
    "quadratic": f"{SHORT} quadratic --tasks quadratic --baselines {FOUR} "
    "--seeds 1000 --tuning-seeds 100",
    "perceptrons": f"{SHORT} --tasks fashion-deep fashion-wide fashion-batch16 fashion-batch1024 "
    f"--baselines {FOUR} --steps 200 --seeds 5 --tuning-seeds 1",
    "convnets": f"{SHORT} --tasks mnist-cnn mnist-cnn-bn cifar10-cnn cifar10-cnn-bn "
    f"--baselines {FOUR} --steps 200 --seeds 5 --tuning-seeds 1",
    "language": f"{SHORT} --tasks char-lm-gru char-lm-transformer "
    f"--baselines {FOUR} --steps 200 --seeds 5 --tuning-seeds 1",
    "very-long": f"{SHORT} --tasks mnist mnist-relu "
    f"--baselines {FOUR} --steps 10000 --seeds 5 --tuning-seeds 1",
}  # fmt: skip


def without_curves(summary: Any) -> Any:
    """Returns a summary without its learning curves, which no page shows."""
    if isinstance(summary, dict):
        return {k: without_curves(v) for k, v in summary.items() if k != "curve"}
    return [without_curves(v) for v in summary] if isinstance(summary, list) else summary


def reached(log: RunLog, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns when the learned optimizer has a rival's final loss, by task and rival.

    As shares of the rival's steps and processor seconds, means over the seeds; ``None`` where a
    run never has it.
    """
    runs = {tuple(key.split("|")): run for key, run in log.runs.items() if "|test|" in key}
    protocol = summary["protocol"]
    ((name, fingerprint),) = protocol["checkpoints"].items()
    rivals = {*protocol["tuned"], *protocol["untuned"]} - {name}
    found: dict[str, Any] = {}
    for task, entry in summary["tasks"].items():
        steps = str(entry["steps"])
        mine = {
            key[5]: run
            for key, run in runs.items()
            if key[:3] == (task, "learned", fingerprint) and key[6] == steps
        }
        for rival in sorted(rivals):
            rate = entry["optimizers"][rival]["lr"]
            shares = [
                _share(mine[key[5]], run)
                for key, run in runs.items()
                if (key[0], key[2].split()[0], key[6]) == (task, rival, steps)
                and float(key[3]) == rate
            ]
            whole = [share for share in shares if share is not None]
            means = [fmean(column) for column in zip(*whole, strict=True)]
            found.setdefault(task, {})[rival] = means if len(whole) == len(shares) else None
    return found


def _share(mine: Run, theirs: Run) -> tuple[float, float] | None:
    target, count = final_loss(theirs), len(mine.losses)
    width = math.ceil(FINAL_SHARE * count)  # a final loss is a mean over so many stretches
    for end in range(width, count + 1):
        if fmean(mine.losses[end - width : end]) <= target < math.inf:
            return end / count, end / count * mine.seconds / theirs.seconds
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--workers", type=int, default=1, help="processes")


def run(options: argparse.Namespace) -> None:
    if unknown := set(options.groups) - set(GROUPS):
        raise SystemExit(f"unknown groups {sorted(unknown)}; known: {', '.join(GROUPS)}")
    for name in options.groups or GROUPS:
        output = Path("runs") / f"results-{name}"
        arguments = [*GROUPS[name].split(), "--workers", str(options.workers)]
        status = learned_optim(["evaluate", *arguments, "--output", str(output)])
        if status:
            raise SystemExit(status)
        summary = json.loads((output / "summary.json").read_text())
        if summary["protocol"]["suite"] == "field":
            summary["reached"] = reached(RunLog(output / "runs.jsonl"), summary)
        save(RESULTS / f"{name}.json", without_curves(summary))
