"""docs/results.md: the template filled with what the summaries in docs/results/ say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.ablations import table as ablations_table
from benchmarks.light_bench import table as light_bench_table
from benchmarks.on_field import NOT_MEASURED
from benchmarks.unknown_length import table as unknown_length_table
from benchmarks.widths import table as widths_table
from learned_optim.meta import field_report
from learned_optim.meta.baselines import BASELINES
from learned_optim.meta.field import TUNED, TUNED_QUICK, FieldConfig
from learned_optim.pretrained import ALIASES
from learned_optim.summary import lr_text, plot, ratio_text, table, value_text

DOCS = Path(__file__).parent.parent / "docs"

FIELD_COMMAND = "python -m benchmarks.results field"

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


def page(groups: Iterable[str]) -> str:
    """docs/results.md, from the summaries of ``groups`` alone."""
    text = (Path(__file__).parent / "results_template.md").read_text()
    summaries = {
        name: json.loads(path.read_text())
        for name in groups
        if (path := DOCS / "results" / f"{name}.json").exists()
    }
    for summary in summaries.values():
        longest = max(summary["protocol"]["horizons"])
        for task in summary["tasks"]:
            plot(summary, task, longest, DOCS / "results" / f"{task}-{longest}.png")
    text = text.replace("{thesis-table}", _thesis_table(summaries))
    text = text.replace("{verdict}", _verdict(summaries))
    text = text.replace("{time}", _time(summaries))
    for name, body in {**field_sections(), **quick_section()}.items():
        text = text.replace(f"{{field-{name}}}", body)
    text = text.replace("{lightbench}", light_bench_table())
    text = text.replace("{unknown-length}", unknown_length_table())
    text = text.replace("{widths}", widths_table())
    text = text.replace("{ablations}", ablations_table())
    text = text.replace("{warmup}", _warmup())
    for name in groups:
        body = _tables(summaries[name]) if name in summaries else NOT_MEASURED
        text = text.replace(f"{{{name}}}", body)
        plots = _plots(summaries[name]) if name in summaries else ""
        text = text.replace(f"{{{name}-plots}}", plots)
    return text


def _warmup() -> str:
    """What the warm-up of the older checkpoints costs networks from scratch."""
    path = DOCS / "results" / "warmup.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    rows = [
        [
            f"`{name}`",
            warmup,
            *(f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in cells.values()),
            *(f"{cell['its']:.2f} ({cell['dearest']})" for cell in cells.values()),
        ]
        for name, warmups in found["checkpoints"].items()
        for warmup, cells in warmups.items()
    ]
    head = ["", "steps of warm-up", "100 steps", "200 steps", "dearest task, 100", "200"]
    return (
        f"Over {len(found['tasks'])} tasks (the thesis's networks in both initializations, digits, "
        f"regression), geometric mean ± standard deviation over {found['seeds']} seeds:\n\n"
        f"{table(head, rows)}"
    )


def field_sections() -> dict[str, str]:
    """Parts of the page about the field, from docs/results/field.json; draws its profile.

    Without a summary of the whole field, that of the quick tier stands in, and says so.
    """
    names = ("protocol", "profile", "untuned", "pairs", "tuned", "tasks", "details", "ahead")
    paths = [DOCS / "results" / name for name in ("field.json", "field-quick.json")]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return {**dict.fromkeys(names, NOT_MEASURED), "command": FIELD_COMMAND}
    summary = json.loads(path.read_text())
    field_report.plot_profile(summary, DOCS / "results" / f"field-{field_report.PROFILE_FILE}")
    details = [f"### {t}\n\n{field_report.task_table(summary, t)}" for t in summary["tasks"]]
    image = f"results/field-{field_report.PROFILE_FILE}"
    effort = summary["effort"]
    return {
        "command": field_command(summary["protocol"]),
        "protocol": f"{field_report.describe(summary)} The {effort['runs']:,} runs trained for "
        f"{effort['hours']:.1f} hours of one thread.",
        "profile": f"![Performance profiles of all optimizers over the field]({image})",
        "untuned": field_report.untuned_table(summary),
        "pairs": field_report.pairs_table(summary),
        "tuned": field_report.tuned_table(summary),
        "tasks": field_report.ratios_table(summary),
        "details": "\n\n".join(details),
        "ahead": field_report.in_words(summary),
    }


def quick_section() -> dict[str, str]:
    """What the page shows of the quick tier, which may have more tuned rivals than the whole."""
    path = DOCS / "results" / "field-quick.json"
    if not path.exists():
        return {"quick-command": f"{FIELD_COMMAND} --quick", "quick": NOT_MEASURED}
    summary = json.loads(path.read_text())
    report = (
        field_report.describe(summary), field_report.pairs_table(summary),
        field_report.tuned_table(summary),
    )  # fmt: skip
    return {"quick-command": field_command(summary["protocol"]), "quick": "\n\n".join(report)}


def field_command(protocol: dict[str, Any]) -> str:
    """What runs the part of the field that the page shows."""
    tier = FieldConfig(quick=protocol["quick"]).filled()
    tuned = [name for name in protocol["tuned"] if name in BASELINES]
    words = [FIELD_COMMAND, "--quick" * protocol["quick"]]
    if {*tuned} != {*TUNED, *TUNED_QUICK} & {*tier.baselines}:
        words += ["--tuned", *tuned]
        words += ["--no-untuned"] * ({*protocol["untuned"]} <= {*protocol["checkpoints"]})
    if protocol["seeds"] != tier.seeds:
        words += ["--seeds", str(protocol["seeds"])]
    return " ".join(filter(None, words))


def _time(summaries: dict[str, Any]) -> str:
    if not summaries:
        return NOT_MEASURED
    hours = {name: summary["effort"]["hours"] for name, summary in summaries.items()}
    runs = sum(summary["effort"]["runs"] for summary in summaries.values())
    each = ", ".join(f"{name} {60 * spent:.0f}" for name, spent in hours.items())
    total = sum(hours.values())
    return (
        f"The {runs:,} runs behind this page trained for {total:.1f} hours of one thread, so about "
        f"{total / 2:.1f} hours on two cores (`--workers 2`), on a machine that also had "
        f"other things to do. Minutes per group: {each}."
    )


def _thesis_table(summaries: dict[str, Any]) -> str:
    checkpoints = summaries.get("thesis", {}).get("protocol", {}).get("checkpoints", {})
    default = next(iter(checkpoints), ALIASES["default"])  # the first one that was run
    head = ["figure", "task", "thesis: best hand-written", "thesis: learned",
            "ours: best tuned baseline", "ours: the thesis's LSTM", f"ours: `{default}`",
            f"`{default}` / best [95 %]"]  # fmt: skip
    rows = []
    for task, (figure, baseline, learned) in THESIS.items():
        group, lstm = ("quadratic", "quadratic") if task == "quadratic" else ("thesis", "mnist")
        cell = summaries.get(group, {}).get("tasks", {}).get(task)
        if cell is None:
            rows.append([figure, task, baseline, learned, *["not measured"] * 4])
            continue
        optimizers = cell["horizons"]["100"]["optimizers"]
        best = cell["horizons"]["100"]["best_baseline"]
        rows.append(
            [
                figure,
                task,
                baseline,
                learned,
                f"{value_text(optimizers[best]['sum'])} ({best}, lr {lr_text(optimizers[best])})",
                value_text(optimizers[lstm]["sum"]),
                value_text(optimizers[default]["sum"]),
                ratio_text(optimizers[default]["ratio"]),
            ]
        )
    return table(head, rows)


def _tables(summary: dict[str, Any]) -> str:
    """Per horizon, everybody's summed loss; then the other figures of the learned and the best."""
    protocol = summary["protocol"]
    learned = list(protocol["checkpoints"])
    parts = [f"{protocol['seeds']} test seeds, {protocol['tuning_seeds']} tuning seeds."]
    for horizon in protocol["horizons"]:
        head = ["task", *(f"{name} / best [95 %]" for name in learned), *learned]
        rows, figures = [], []
        for task, entry in summary["tasks"].items():
            cell = entry["horizons"][str(horizon)]
            optimizers, best = cell["optimizers"], cell["best_baseline"]
            mine = [optimizers[name] for name in learned]
            row = [task, *(ratio_text(each.get("ratio")) for each in mine)]
            row += [value_text(each["sum"]) for each in mine]
            for name in protocol["baselines"]:
                shown = f"{value_text(optimizers[name]['sum'])} (lr {lr_text(optimizers[name])})"
                row.append(f"**{shown}**" if name == best else shown)
            rows.append(row)
            for name in [*learned, best]:
                if name is not None:
                    goal = cell["best_final_baseline"]
                    figures.append([task, name, *_figures(optimizers[name], goal)])
        overview = table([*head, *protocol["baselines"]], rows)
        parts.append(f"Summed loss over {horizon:,} steps:\n\n{overview}")
        used = [i for i in range(len(_FIGURES)) if any(row[i] for row in figures)]
        kept = [[row[i] for i in used] for row in (_FIGURES, *figures)]
        parts.append(
            f"After {horizon:,} steps, of the learned and of the best tuned optimizer:\n\n"
            f"{table(kept[0], kept[1:])}"
        )
    return "\n\n".join(parts)


_FIGURES = [
    "task",
    "optimizer",
    "last 10 steps",
    "worst running mean after step 1,000",
    "test accuracy",
    "ms per step",
    "reaches the lowest final loss of a tuned optimizer after",
]


def _figures(row: dict[str, Any], goal: str) -> list[str]:
    """One row of :data:`_FIGURES`, without task and optimizer.

    Args:
        row: the optimizer's part of a summary.
        goal: the baseline whose final loss is to be reached.
    """
    accuracy = row.get("test", {}).get("accuracy")
    reached = ""
    if row["kind"] == "learned":
        steps, seconds = row.get("steps_to_best"), row.get("seconds_to_best")
        reached = f"{steps:.0f} steps, {seconds:.2f} s" if steps and seconds else "never"
        reached = f"{reached} ({goal})"
    return [
        value_text(row["last"], 3),
        value_text(row.get("worst_after_1000"), 3),
        value_text(accuracy, 3),
        value_text(row["milliseconds_per_step"], 2),
        reached,
    ]


def _verdict(summaries: dict[str, Any]) -> str:
    """Per checkpoint, where it is ahead of every tuned optimizer, and where it is not."""
    head = ["checkpoint", "tasks", "steps", "ahead on", "mean ratio", "behind on"]
    rows = []
    for checkpoint in dict.fromkeys(
        n for s in summaries.values() for n in s["protocol"]["checkpoints"]
    ):
        for name, summary in summaries.items():
            if checkpoint not in summary["protocol"]["checkpoints"]:
                continue
            for horizon in summary["protocol"]["horizons"]:
                ratios = {
                    task: entry["horizons"][str(horizon)]["optimizers"][checkpoint]["ratio"]["mean"]
                    for task, entry in summary["tasks"].items()
                }
                finite = [ratio for ratio in ratios.values() if ratio is not None]
                ahead = [ratio for ratio in finite if ratio < 1]
                behind = [
                    f"{task} ({'diverged' if ratio is None else f'{ratio:.2f}'})"
                    for task, ratio in ratios.items()
                    if ratio is None or ratio >= 1
                ]
                mean = math.exp(sum(map(math.log, finite)) / len(finite)) if finite else math.nan
                rows.append(
                    [f"`{checkpoint}`", name, f"{horizon:,}", f"{len(ahead)} of {len(ratios)}",
                     f"{mean:.2f}", ", ".join(behind)]
                )  # fmt: skip
    return table(head, rows)


def _plots(summary: dict[str, Any]) -> str:
    longest = max(summary["protocol"]["horizons"])
    return "\n".join(
        f"![{task}: training loss over {longest:,} steps](results/{task}-{longest}.png)"
        for task in summary["tasks"]
    )
