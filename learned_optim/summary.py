"""An evaluation's summary as Markdown tables and plots.

A summary is plain data, as ``learned-optim evaluate`` writes it into ``summary.json``. The
evaluation's report and the Hub's model card are drawn with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from learned_optim.checkpoint import write_text

#: Colours of Okabe and Ito (2008), told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")

#: Most tasks whose figures are printed one by one, and whose curves are drawn.
FEW = 8


# ---- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_text(interval: dict[str, Any] | None, digits: int = 1) -> str:
    """A mean with half its interval, as ``"12.3 ± 0.4"``; "" for ``None``."""
    if interval is None:
        return ""
    if interval["mean"] is None:
        return "diverged"
    mean = f"{interval['mean']:.{digits}f}"
    return mean if interval["half"] is None else f"{mean} ± {interval['half']:.{digits}f}"


def ratio_text(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval, ``"0.61 [0.58, 0.64]"``, bold below 1; "" for ``None``."""
    if ratio is None:
        return ""
    if ratio["mean"] is None:
        return "diverged"
    text = f"{ratio['mean']:.2f}"
    if ratio["low"] is None or ratio["high"] is None:
        return text
    text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"**{text}**" if ratio["high"] < 1 else text


def markdown(summary: dict[str, Any]) -> str:
    """Protocol, the tables over all tasks, and those of every task."""
    parts = [describe(summary)]
    if any(summary["worth"].values()):
        parts.append("## What one untuned run is worth\n\n" + worth_table(summary))
    if len(summary["protocol"]["untuned"]) > len(summary["protocol"]["checkpoints"]):
        parts.append(
            "## Untuned against untuned\n\nGeometric mean of final losses, row over column; below "
            "1 the row is ahead:\n\n" + pairs_table(summary)
        )
    parts += [
        "## Untuned against tuned\n\n" + tuned_table(summary),
        "## By task\n\n" + by_task(summary),
    ]
    return "\n\n".join(parts) + "\n"


def brief(summary: dict[str, Any]) -> str:
    """The terminal's summary: few tasks one by one, or means over many."""
    if len(summary["tasks"]) <= FEW:
        figures = by_task(summary)
    else:
        rows = [
            [name, ratio_text(row.get("ratio")), ratio_text(row.get("test_ratio"))]
            for name, row in summary["overall"].items()
        ]
        figures = table(["optimizer", "final loss / best tuned", "held-out loss"], rows)
    return "\n\n".join(part for part in (in_words(summary), figures, _skipped(summary)) if part)


def describe(summary: dict[str, Any]) -> str:
    """The protocol in a paragraph, and optimizers that were left out."""
    protocol = summary["protocol"]
    by = "summed" if protocol["tune_by"] == "sum" else "final"
    tier = " of the quick tier" if protocol["quick"] else ""
    seeds = _counted(protocol["seeds"], "test seed")
    text = (
        f"{_counted(len(summary['tasks']), 'task')}{tier}, {seeds}, learning rates of tuned rivals "
        f"chosen from {', '.join(f'{lr:g}' for lr in protocol['lr_grid'])} by the {by} loss on "
        f"{protocol['tuning_seeds']} other. The final loss is the mean over the last 5 % of the "
        f"steps. Means over tasks are geometric, of ratios cut off at 1/10 and 10; a run that "
        f"diverged counts as 10. Bold: the whole 95 % interval is below 1. Times are processor "
        f"time of one thread. ‡: at the edge of the grid of learning rates; beyond it there may be "
        f"a better one."
    )
    return "\n\n".join(part for part in (text, _skipped(summary)) if part)


def worth_table(summary: dict[str, Any]) -> str:
    """Number of tuned runs whose best an untuned run equals."""
    rows = []
    for name, rivals in summary["worth"].items():
        for rival, groups in rivals.items():
            for group, found in groups.items():
                last = {end: found[end][-1] for end in ("mean", "low", "high")}
                row = [_name(summary, name), rival, group, str(found["tasks"])]
                rows.append([*row, _equals(found), ratio_text(last).strip("*")])
    head = ["one run of", "rival", "tasks", "number", "equals the best of", "best of all over it"]
    return table(head, rows)


def tuned_table(summary: dict[str, Any]) -> str:
    """All optimizers against the best tuned rival of each task."""
    if not any("ratio" in row for row in summary["overall"].values()):
        return "No tuned rival took part."
    head = ["optimizer", "final loss / best tuned [95 %]", "held-out loss", "summed loss",
            "at most the tuned one's", "diverged", "optimizer ms per step"]  # fmt: skip
    rows = []
    for name, row in summary["overall"].items():
        ratios = [ratio_text(row[ratio]) for ratio in ("ratio", "test_ratio", "sum_ratio")]
        counts = [f"{row['at_most_tuned']} of {row['tasks']}", f"{row['diverged']:.0%}"]
        spent = row["optimizer_milliseconds"]
        time = "" if spent is None else f"{spent:.2f}"
        rows.append([_name(summary, name), *ratios, *counts, time])
    return table(head, rows)


def pairs_table(summary: dict[str, Any]) -> str:
    """Learned optimizers (rows) against every other one, untuned and tuned (columns)."""
    pairs, protocol = summary["untuned_pairs"], summary["protocol"]
    learned, names = list(protocol["checkpoints"]), (*protocol["untuned"], *protocol["tuned"])
    others = [other for other in names if any(other in pairs[name] for name in learned)]
    rows = [
        [_name(summary, name), *(ratio_text(pairs[name].get(other)) for other in others)]
        for name in learned
    ]
    head = [f"{other}, tuned" if other in protocol["tuned"] else other for other in others]
    return table(["", *head], rows)


def by_task(summary: dict[str, Any]) -> str:
    """A row per task and optimizer, with ratios to the best tuned."""
    rows = [
        [
            f"{task}, {entry['steps']:,} steps",
            _name(summary, name),
            _lr(summary, name, row["lr"]),
            f"{row['diverged']} diverged" if row["diverged"] else value_text(row["final"], 4),
            _held_out(row["test"]),
            value_text(row["sum"]),
            "best tuned" if name == entry["best_tuned"] else ratio_text(row.get("ratio")),
        ]
        for task, entry in summary["tasks"].items()
        for name, row in entry["optimizers"].items()
    ]
    head = ["task", "optimizer", "lr", "final loss", "held-out", "summed", "final / best tuned"]
    return table(head, rows)


def _held_out(test: dict[str, Any]) -> str:
    """The held-out loss, and the accuracy where there is one."""
    accuracy = test.get("accuracy", {}).get("mean")
    return value_text(test.get("loss"), 3) + ("" if accuracy is None else f", {accuracy:.1%}")


def in_words(summary: dict[str, Any]) -> str:
    """The tables in words; ahead and behind exclude 1 from the interval."""
    protocol, overall = summary["protocol"], summary["overall"]
    lines = []
    for name in protocol["checkpoints"]:
        row = overall[name]
        groups: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
        for other, found in summary["untuned_pairs"][name].items():
            if other in protocol["untuned"]:
                ahead, behind = (found["high"] or 1) < 1, (found["low"] or 1) > 1
                where = "ahead of" if ahead else "behind" if behind else "level with"
                groups[where].append(other)
        text = f"- `{name}`, untuned:"
        listed = ", ".join(
            f"{where} {', '.join(names)}" for where, names in groups.items() if names
        )
        if listed:
            text += f" {listed} in the geometric mean of final losses."
        if row.get("ratio"):
            text += (
                f" Its final loss is {row['ratio']['mean']:.2f} times the best tuned rival's, and "
                f"at most that rival's on {row['at_most_tuned']} of {row['tasks']} tasks."
            )
        for rival, found in summary["worth"][name].items():
            if "all" in found:
                text += f" One run equals the best of {_equals(found['all'])} {rival} runs."
        tasks = [t for t, e in summary["tasks"].items() if e["optimizers"][name]["diverged"]]
        text += f" It diverged on {', '.join(tasks)}." if tasks else " It never diverged."
        lines.append(text)
    return "\n".join(lines)


def _skipped(summary: dict[str, Any]) -> str:
    skipped = summary["protocol"]["skipped"]
    notes = [f"Without {name}: {why}." for name, why in skipped.items()]
    return "\n\n".join([f"{len(notes)} left out.", *notes]) if notes else ""


def _equals(found: dict[str, Any]) -> str:
    count = len(found["mean"])
    if found["equals"] is None:
        return f"more than {count}"
    return f"{found['equals']:.1f}" if found["equals"] >= 1 else "less than 1"


def _name(summary: dict[str, Any], name: str) -> str:
    """A learned optimizer in bold."""
    return f"**{name}**" if name in summary["protocol"]["checkpoints"] else name


def _lr(summary: dict[str, Any], name: str, lr: float) -> str:
    """A learning rate, marked at an edge of the tuning grid."""
    grid, tuned = summary["protocol"]["lr_grid"], name in summary["protocol"]["tuned"]
    return f"{lr:g}" + "‡" * (tuned and lr in (grid[0], grid[-1]))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


# ---- plots


def write_report(summary: dict[str, Any], folder: Path) -> list[Path]:
    """``table.md`` and the plots in ``folder``; returns what was written."""
    written = [folder / "table.md"]
    write_text(written[0], markdown(summary))
    return written + [folder / name for name in draw(summary, folder)]


def draw(summary: dict[str, Any], folder: Path) -> list[str]:
    """The plots of a summary as PNGs in ``folder``; their names.

    Curves of every task if there are few, and what an untuned run is worth if there were learned
    optimizers and tuned rivals.
    """
    names, protocol = [], summary["protocol"]
    tasks = summary["tasks"] if len(summary["tasks"]) <= FEW else {}
    for task, entry in tasks.items():
        curves = {
            f"{name} (learned)"
            if name in protocol["checkpoints"]
            else f"{name} (lr {_lr(summary, name, row['lr'])})": row["curve"]
            for name, row in entry["optimizers"].items()
        }
        names.append(f"{task.replace(':', '.')}.png")
        title = f"{task}, mean of {_counted(protocol['seeds'], 'seed')}"
        draw_curves(curves, folder / names[-1], title)
    if any("all" in found for by in summary["worth"].values() for found in by.values()):
        names.append("worth.png")
        plot_worth(summary["worth"], folder / names[-1])
    return names


def draw_curves(curves: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Loss by step, log scale; labels ending in ``(learned)`` are solid.

    A curve has lists ``step``, ``mean`` and ``half``, and ends where its mean is ``None``.
    """
    figure, axes = _axes(title, "step", "training loss")
    for (label, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        mean, half = (
            [math.nan if x is None else x for x in curve[part]] for part in ("mean", "half")
        )
        learned = label.endswith("(learned)")
        axes.plot(
            curve["step"], mean,
            color=colour,
            linestyle="-" if learned else "--",
            linewidth=2.0 if learned else 1.3,
            label=label,
            zorder=3 if learned else 2,
        )  # fmt: skip
        # A log axis has no room for an interval that reaches below zero.
        low = [max(m - h, 0.05 * m) for m, h in zip(mean, half, strict=True)]
        high = [m + h for m, h in zip(mean, half, strict=True)]
        axes.fill_between(curve["step"], low, high, color=colour, alpha=0.15, lw=0)
    positive = [[m for m in curve["mean"] if m and m > 0] for curve in curves.values()]
    positive = [means for means in positive if means]
    if positive:
        # Not the excursions far above the start: they would flatten everything else.
        low, high = 0.8 * min(map(min, positive)), 2.0 * max(means[0] for means in positive)
        axes.set_yscale("log")
        axes.set_ylim(low, min(high, 1.1 * max(map(max, positive))))
        _plain_numbers(axes.yaxis, (1, 2, 5) if high < 1000 * low else (1,))
    else:
        axes.text(0.5, 0.5, "no loss was finite", transform=axes.transAxes, ha="center")
    # Beside the axes, a legend covers no curve.
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.set_figwidth(10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_worth(worth: dict[str, Any], path: Path) -> None:
    """The best of ``k`` tuned runs over one run of the first learned optimizer.

    ``worth`` is a summary's entry of that name. The suffix of ``path`` says which kind of image.
    """
    name, rivals = next(iter(worth.items()))
    label = f"final loss of their best, times one run of {name}"
    figure, axes = _axes("", "runs of the rival, at randomly chosen learning rates", label)
    rivals = {rival: groups["all"] for rival, groups in rivals.items() if "all" in groups}
    for (rival, found), colour in zip(rivals.items(), _colours(len(rivals)), strict=True):
        k = range(1, len(found["mean"]) + 1)
        text = f"{rival}: one run equals the best of {_equals(found)}"
        axes.plot(k, found["mean"], color=colour, marker="o", markersize=4, label=text)
        if found["low"][0] is not None:
            axes.fill_between(k, found["low"], found["high"], color=colour, alpha=0.12, lw=0)
    axes.axhline(1.0, color="black", linewidth=1.6, label=f"one run of {name}, untuned")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
    axes.legend(frameon=False, loc="upper right")  # the curves fall to the right
    figure.savefig(path, dpi=120)


def _colours(count: int) -> Iterable[Any]:
    """``count`` different colours."""
    from matplotlib import colormaps

    if count <= len(COLOURS):
        return COLOURS[:count]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, which="both", alpha=0.2)
    return figure, axes


def _plain_numbers(axis: Any, multiples: tuple[float, ...]) -> None:
    """Plain numbers at these multiples of powers of ten, on a log axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
