"""The figures of docs/results.md: run every evaluation, then write the page from what they found.

    python -m benchmarks.results run [GROUP ...]   # resumable; runs/ keeps every single run
    python -m benchmarks.results refresh [GROUP ...]  # the checkpoints again, not the baselines
    python -m benchmarks.results field [--quick]   # real training runs; resumable
    python -m benchmarks.results page              # docs/results.md from docs/results/*.json

``run`` needs MNIST, FashionMNIST, EMNIST Letters and CIFAR-10 in the folder that
``$LEARNED_OPTIM_DATA`` names, and leaves a compact summary of every group in docs/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.results_page import DOCS, page
from learned_optim.checkpoint import write_text
from learned_optim.cli import ProgressBar
from learned_optim.meta import EvaluateConfig, Evaluation
from learned_optim.meta.field import UNTUNED, FieldConfig, FieldEvaluation

NETWORKS = (
    "mnist",
    "mnist-40",
    "mnist-2layer",
    "mnist-relu",
    "fashion",
    "emnist-letters",
    "cifar10",
)
ALL = ("sgd", "nesterov", "rmsprop", "adam", "adamw", "schedulefree")
FOUR = ("sgd", "nesterov", "rmsprop", "adam")

#: The general-purpose checkpoints.
GENERAL = ("diagonal", "coordinatewise")
EVERY = (*GENERAL, "mnist")

GROUPS = {
    "thesis": EvaluateConfig(checkpoints=EVERY, tasks=NETWORKS, baselines=ALL),
    "thesis-torch": EvaluateConfig(
        checkpoints=EVERY, tasks=tuple(f"{n}-torch" for n in NETWORKS), baselines=FOUR
    ),
    "quadratic": EvaluateConfig(
        checkpoints=(*GENERAL, "quadratic"),
        tasks=("quadratic",),
        baselines=FOUR,
        horizons=(100,),
        seeds=1000,
        tuning_seeds=100,
    ),
    "familiar": EvaluateConfig(
        checkpoints=EVERY,
        tasks=("digits", "digits-torch", "regression"),
        baselines=FOUR,
        horizons=(200,),
    ),
    "familiar-long": EvaluateConfig(
        checkpoints=GENERAL,
        tasks=("digits-torch", "regression"),
        baselines=FOUR,
        horizons=(2000,),
        tuning_seeds=1,
    ),
    "perceptrons": EvaluateConfig(
        checkpoints=GENERAL,
        tasks=("fashion-deep", "fashion-wide", "fashion-batch16", "fashion-batch1024"),
        baselines=FOUR,
        horizons=(200,),
        seeds=5,
        tuning_seeds=1,
    ),
    "convnets": EvaluateConfig(
        checkpoints=GENERAL,
        tasks=("mnist-cnn", "mnist-cnn-bn", "cifar10-cnn", "cifar10-cnn-bn"),
        baselines=FOUR,
        horizons=(200,),
        seeds=5,
        tuning_seeds=1,
    ),
    "language": EvaluateConfig(
        checkpoints=GENERAL,
        tasks=("char-lm-gru", "char-lm-transformer"),
        baselines=FOUR,
        horizons=(200,),
        seeds=5,
        tuning_seeds=1,
    ),
    "long": EvaluateConfig(
        checkpoints=EVERY,
        tasks=("mnist", "mnist-relu"),
        baselines=FOUR,
        horizons=(2000,),
    ),
    "very-long-lstm": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("mnist",),
        baselines=FOUR,
        horizons=(10_000,),
        seeds=3,
        tuning_seeds=1,
    ),
    "very-long": EvaluateConfig(
        checkpoints=GENERAL,
        tasks=("mnist", "mnist-relu"),
        baselines=FOUR,
        horizons=(10_000,),
        seeds=5,
        tuning_seeds=1,
    ),
}


def run(names: list[str], baselines_only: bool, workers: int) -> None:
    """Evaluate groups and leave their compact summaries in docs/results/."""
    for name in names:
        config = replace(GROUPS[name], output=Path("runs") / f"results-{name}", workers=workers)
        if baselines_only:
            config = replace(config, checkpoints=())
        started = time.perf_counter()
        with ProgressBar(name) as show:
            summary = Evaluation(config, show).execute()
        print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min")
        if not baselines_only:
            summary["effort"] = _effort(config.output / "runs.jsonl")
            path = DOCS / "results" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(summary, separators=(",", ":")) + "\n")


def run_field(quick: bool, tuned: tuple[str, ...], untuned: bool, seeds: int, workers: int) -> None:
    """Run the field and leave its summary in docs/results/."""
    name = "field-quick" if quick else "field"
    config = FieldConfig(
        quick=quick,
        baselines=(*tuned, *(UNTUNED if untuned else ())) if tuned else (),
        seeds=seeds,
        output=Path("runs") / f"results-{name}",
        workers=workers,
    )
    started = time.perf_counter()
    with ProgressBar(name) as show:
        summary = FieldEvaluation(config, show).execute()
    print(f"{name}: {(time.perf_counter() - started) / 60:.1f} min")
    summary["effort"] = _effort(config.output / "runs.jsonl")
    write_text(DOCS / "results" / f"{name}.json", json.dumps(summary, separators=(",", ":")) + "\n")


def refresh(names: list[str], workers: int) -> None:
    """Evaluate the checkpoints anew beside the baselines that docs/results/ knows already."""
    for name in names:
        config = replace(GROUPS[name], output=Path("runs") / f"results-{name}", workers=workers)
        path = DOCS / "results" / f"{name}.json"
        with ProgressBar(name) as show:
            summary = Evaluation(config, show).refresh(json.loads(path.read_text()))
        path.write_text(json.dumps(summary, separators=(",", ":")) + "\n")


def _effort(log: Path) -> dict[str, float]:
    """How many runs a group took, and the hours of one thread they trained for."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {"runs": len(entries), "hours": sum(e["seconds"] or 0.0 for e in entries) / 3600}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="evaluate")
    runner.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    runner.add_argument("--baselines-only", action="store_true", help="leave checkpoints for later")
    runner.add_argument("--workers", type=int, default=1)
    again = commands.add_parser("refresh", help="evaluate the checkpoints anew")
    again.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    again.add_argument("--workers", type=int, default=1)
    fielded = commands.add_parser("field", help="real training runs")
    fielded.add_argument("--quick", action="store_true", help="fewer steps, seeds and rivals")
    fielded.add_argument("--tuned", nargs="+", default=[], metavar="RIVAL", help="fewer of them")
    fielded.add_argument("--no-untuned", action="store_true", help="only those of --tuned")
    fielded.add_argument(
        "--seeds", type=int, default=0, help="of the test; the tier's if not given"
    )
    fielded.add_argument("--workers", type=int, default=1)
    commands.add_parser("page", help="write docs/results.md")
    args = parser.parse_args()
    if args.command == "page":
        (DOCS / "results.md").write_text(page(GROUPS))
        return
    if args.command == "field":
        if args.no_untuned and not args.tuned:
            parser.error("--no-untuned leaves no rival: name some with --tuned")
        run_field(args.quick, tuple(args.tuned), not args.no_untuned, args.seeds, args.workers)
        return
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {sorted(unknown)}; known: {', '.join(GROUPS)}")
    if args.command == "refresh":
        refresh(args.groups or list(GROUPS), args.workers)
    else:
        run(args.groups or list(GROUPS), args.baselines_only, args.workers)


if __name__ == "__main__":
    main()
