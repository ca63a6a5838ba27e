"""The figures of docs/results.md: run every evaluation, then write the page from what they found.

    python -m benchmarks.results run [GROUP ...]   # resumable; runs/ keeps every single run
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
from typing import Any

from learned_optim.cli import ProgressBar
from learned_optim.meta import EvaluateConfig, Evaluation
from learned_optim.summary import lr_text, plot, ratio_text, table, value_text

DOCS = Path(__file__).parent.parent / "docs"
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

GROUPS = {
    "thesis": EvaluateConfig(checkpoints=("mnist",), tasks=NETWORKS, baselines=ALL),
    "thesis-torch": EvaluateConfig(
        checkpoints=("mnist",), tasks=tuple(f"{n}-torch" for n in NETWORKS), baselines=FOUR
    ),
    "quadratic": EvaluateConfig(
        checkpoints=("quadratic",),
        tasks=("quadratic",),
        baselines=FOUR,
        horizons=(100,),
        seeds=1000,
        tuning_seeds=100,
    ),
    "familiar": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("digits", "digits-torch", "regression"),
        baselines=FOUR,
        horizons=(200,),
    ),
    "convnets": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("mnist-cnn", "mnist-cnn-bn", "cifar10-cnn", "cifar10-cnn-bn"),
        baselines=FOUR,
        horizons=(200,),
    ),
    "language": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("char-lm-gru", "char-lm-transformer"),
        baselines=FOUR,
        horizons=(200,),
    ),
    "long": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("mnist", "mnist-relu"),
        baselines=FOUR,
        horizons=(2000,),
    ),
    "very-long": EvaluateConfig(
        checkpoints=("mnist",),
        tasks=("mnist",),
        baselines=FOUR,
        horizons=(10_000,),
        seeds=3,
        tuning_seeds=1,
    ),
}

# The published notebook's summed losses over 100 steps: best hand-written optimizer, learned one.
# Entries with a note come from runs the notebook mistuned, see "What is wrong" on the page.
THESIS = {
    "quadratic": ("4.1", "98.8 (Adam)", "49.6, the best of 100 noisy validations"),
    "mnist": ("4.3", "86.2 (Adam)", "50.9"),
    "mnist-40": ("4.4", "detuned", "plot only"),
    "mnist-2layer": ("4.5", "detuned", "plot only"),
    "mnist-relu": ("4.6", "detuned", "plot only, behind SGD and Nesterov"),
    "fashion": ("4.8", "108.5 (Adam)", "about 80, read off the plot"),
    "emnist-letters": ("4.10", "236.2 (Adam)", "plot only, ahead until step 110"),
    "cifar10": ("4.13", "detuned", "plot only, behind SGD and Nesterov"),
    "svhn": ("4.14", "plot only", "plot only, level with SGD"),
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
            path = DOCS / "results" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(summary, separators=(",", ":")) + "\n")


def page() -> str:
    """docs/results.md, from the summaries alone."""
    text = (Path(__file__).parent / "results_template.md").read_text()
    summaries = {
        name: json.loads(path.read_text())
        for name in GROUPS
        if (path := DOCS / "results" / f"{name}.json").exists()
    }
    for summary in summaries.values():
        for task in summary["tasks"]:
            for horizon in summary["protocol"]["horizons"]:
                plot(summary, task, horizon, DOCS / "results" / f"{task}-{horizon}.png")
    text = text.replace("{thesis-table}", _thesis_table(summaries))
    text = text.replace("{verdict}", _verdict(summaries))
    for name in GROUPS:
        body = _tables(summaries[name]) if name in summaries else "Not measured yet."
        text = text.replace(f"{{{name}}}", body)
        plots = _plots(summaries[name]) if name in summaries else ""
        text = text.replace(f"{{{name}-plots}}", plots)
    return text


def _thesis_table(summaries: dict[str, Any]) -> str:
    head = ["figure", "task", "thesis: best hand-written", "thesis: learned",
            "ours: best tuned baseline", "ours: learned", "ratio [95 %]"]  # fmt: skip
    rows = []
    for task, (figure, baseline, learned) in THESIS.items():
        group = "quadratic" if task == "quadratic" else "thesis"
        cell = summaries.get(group, {}).get("tasks", {}).get(task)
        if cell is None:
            rows.append([figure, task, baseline, learned, *["not measured"] * 3])
            continue
        optimizers = cell["horizons"]["100"]["optimizers"]
        best = cell["horizons"]["100"]["best_baseline"]
        mine = _learned(cell["horizons"]["100"])
        rows.append(
            [
                figure,
                task,
                baseline,
                learned,
                f"{value_text(optimizers[best]['sum'])} ({best}, lr {lr_text(optimizers[best])})",
                value_text(mine["sum"]),
                ratio_text(mine["ratio"]),
            ]
        )
    return table(head, rows)


def _tables(summary: dict[str, Any]) -> str:
    """Per horizon, everybody's summed loss; then the other figures of the learned and the best."""
    protocol = summary["protocol"]
    parts = [f"{protocol['seeds']} test seeds, {protocol['tuning_seeds']} tuning seeds."]
    for horizon in protocol["horizons"]:
        head = ["task", "ratio to best baseline [95 %]", "learned", *protocol["baselines"]]
        rows, figures = [], []
        for task, entry in summary["tasks"].items():
            cell = entry["horizons"][str(horizon)]
            mine, best = _learned(cell), cell["optimizers"].get(cell["best_baseline"])
            row = [task, ratio_text(mine.get("ratio")), value_text(mine["sum"])]
            for name in protocol["baselines"]:
                other = cell["optimizers"][name]
                shown = f"{value_text(other['sum'])} (lr {lr_text(other)})"
                row.append(f"**{shown}**" if other is best else shown)
            rows.append(row)
            if best is not None:
                figures.append([task, *_figures(cell, mine, best)])
        parts.append(f"Summed loss over {horizon:,} steps:\n\n{table(head, rows)}")
        used = [i for i in range(len(_FIGURES)) if any(row[i] for row in figures)]
        kept = [[row[i] for i in used] for row in (_FIGURES, *figures)]
        parts.append(f"After {horizon:,} steps:\n\n{table(kept[0], kept[1:])}")
    return "\n\n".join(parts)


_FIGURES = [
    "task",
    "last 10 steps: learned",
    "best baseline",
    "worst running mean after step 1,000: learned",
    "best baseline",
    "test accuracy: learned",
    "best baseline",
    "ms per step: learned",
    "best baseline",
    "learned reaches the lowest final loss of a baseline after",
]


def _figures(cell: dict[str, Any], mine: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """One row of :data:`_FIGURES`, without the task."""
    row = []
    for key in ("last", "worst_after_1000"):
        row += [value_text(each[key], 3) if key in each else "" for each in (mine, best)]
    for each in (mine, best):
        accuracy = each.get("test", {}).get("accuracy")
        row.append(value_text(accuracy, 3) if accuracy else "")
    row += [value_text(each["milliseconds_per_step"], 2) for each in (mine, best)]
    steps, seconds = mine.get("steps_to_best"), mine.get("seconds_to_best")
    reached = f"{steps:.0f} steps, {seconds:.2f} s" if steps and seconds else "never"
    row.append(f"{reached} ({cell['best_final_baseline']})")
    return row


def _learned(cell: dict[str, Any]) -> dict[str, Any]:
    """The row of the one learned optimizer."""
    return next(row for row in cell["optimizers"].values() if row["kind"] == "learned")


def _verdict(summaries: dict[str, Any]) -> str:
    """Where the learned optimizer is ahead of every tuned one, and where it is not."""
    lines = []
    for name, summary in summaries.items():
        for horizon in summary["protocol"]["horizons"]:
            ratios = {
                task: _learned(entry["horizons"][str(horizon)])["ratio"]["mean"]
                for task, entry in summary["tasks"].items()
            }
            ahead = [t for t, r in ratios.items() if r is not None and r < 1]
            behind = [
                f"{t} ({'diverged' if r is None else f'{r:.2f}'})"
                for t, r in ratios.items()
                if t not in ahead
            ]
            line = f"- {name}, {horizon:,} steps: ahead on {len(ahead)} of {len(ratios)} tasks"
            lines.append(f"{line}; behind on {', '.join(behind)}." if behind else f"{line}.")
    return "\n".join(lines)


def _plots(summary: dict[str, Any]) -> str:
    longest = max(summary["protocol"]["horizons"])
    return "\n".join(
        f"![{task}: training loss over {longest:,} steps](results/{task}-{longest}.png)"
        for task in summary["tasks"]
    )


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
    commands.add_parser("page", help="write docs/results.md")
    args = parser.parse_args()
    if args.command == "page":
        (DOCS / "results.md").write_text(page())
        return
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown group {sorted(unknown)}; known: {', '.join(GROUPS)}")
    run(args.groups or list(GROUPS), args.baselines_only, args.workers)


if __name__ == "__main__":
    main()
