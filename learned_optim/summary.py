"""An evaluation's summary as Markdown tables and learning-curve plots.

A summary is plain data, as ``learned-optim evaluate`` writes it into ``summary.json``; nothing
here knows of tasks or optimizers. The evaluation's report and the Hub's model card are drawn with
it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

#: Colours of Okabe and Ito (2008), told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")

#: Beside a learning rate in tables and legends.
MARKS = {
    "†": "the learning rate that was best on the tuning seeds diverged on a test seed: this is "
    "the next best that does not",
    "‡": "at the edge of the grid of learning rates: beyond it there may be a better one",
}


def markdown(summary: dict[str, Any]) -> str:
    """The tables: one overview per horizon, then the figures of every task."""
    protocol = summary["protocol"]
    seeds = f"{protocol['seeds']} test seeds, learning rates tuned on {protocol['tuning_seeds']}"
    parts = [f"Mean ± half the 95 % interval; {seeds} others."]
    parts += [f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in _marks(summary)]
    for horizon in protocol["horizons"]:
        parts.append(f"## Summed loss over {horizon:,} steps\n\n" + _overview(summary, horizon))
    for task, entry in summary["tasks"].items():
        parts.append(
            f"## {task}\n\n" + "\n\n".join(_detail(h, v) for h, v in entry["horizons"].items())
        )
    return "\n\n".join(parts) + "\n"


def brief(summary: dict[str, Any]) -> str:
    """A row per task, horizon and optimizer, narrow enough for a terminal."""
    parts = []
    for horizon in summary["protocol"]["horizons"]:
        rows = []
        for task, entry in summary["tasks"].items():
            cell = entry["horizons"][str(horizon)]
            for name, row in cell["optimizers"].items():
                ratio = ratio_text(row.get("ratio")) if row["kind"] == "learned" else ""
                mark = " (best)" if name == cell["best_baseline"] else ""
                rows.append([task, name + mark, lr_text(row), _sum(row), ratio])
        head = ["task", "optimizer", "lr", "summed loss", "over the best baseline's"]
        parts.append(f"Summed loss over {horizon:,} steps:\n\n" + table(head, rows))
    return "\n\n".join(parts) + "\n"


def _marks(summary: dict[str, Any]) -> set[str]:
    """The marks that some learning rate of a summary carries."""
    cells = [cell for task in summary["tasks"].values() for cell in task["horizons"].values()]
    rows = [row for cell in cells for row in cell["optimizers"].values()]
    rows += [row["tuned_by_final"] for row in rows if "tuned_by_final" in row]
    return {mark for row in rows for mark in lr_text(row)} & set(MARKS)


def _names(summary: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Learned optimizers and baselines, in the order they were asked for."""
    protocol = summary["protocol"]
    return list(protocol["checkpoints"]), list(protocol["baselines"])


def _overview(summary: dict[str, Any], horizon: int) -> str:
    learned, baselines = _names(summary)
    head = ["task", *learned, *(f"{name} / best baseline" for name in learned), *baselines]
    rows = []
    for task, entry in summary["tasks"].items():
        cell = entry["horizons"][str(horizon)]
        rows.append(
            [
                task,
                *(_sum(cell["optimizers"][name]) for name in learned),
                *(ratio_text(cell["optimizers"][name].get("ratio")) for name in learned),
                *(
                    _with_lr(cell["optimizers"][name], name == cell["best_baseline"])
                    for name in baselines
                ),
            ]
        )
    return table(head, rows)


def _detail(horizon: str, cell: dict[str, Any]) -> str:
    """All figures of one task at one horizon."""
    optimizers = cell["optimizers"]
    tests = sorted({name for row in optimizers.values() for name in row.get("test", {})})
    long = any("worst_after_1000" in row for row in optimizers.values())
    head = ["optimizer", "lr", "summed loss", "last 10 steps", "lr by last 10", "last 10 so tuned"]
    head += [f"test {name}" for name in tests]
    head += ["worst mean of ten after step 1,000"] * long
    best = cell.get("best_final_baseline")
    head += ["ms per step", f"steps to last 10 so tuned of {best}" if best else "steps"]
    rows = []
    for name, row in optimizers.items():
        final = row.get("tuned_by_final")
        rows.append(
            [
                f"**{name}**" if row["kind"] == "learned" else name,
                lr_text(row),
                _sum(row),
                value_text(row["last"], 3),
                lr_text(final) if final else "",
                value_text(final["last"], 3) if final else "",
                *(value_text(row["test"].get(test), 3) for test in tests),
                *([value_text(row.get("worst_after_1000"), 3)] * long),
                value_text(row.get("milliseconds_per_step"), 2),
                _steps(row),
            ]
        )
    return f"{int(horizon):,} steps\n\n" + table(head, rows)


def _sum(row: dict[str, Any]) -> str:
    """The summed loss, or on how many seeds the optimizer diverged."""
    count = row.get("diverged", 0)
    return f"{count} diverged" if count else value_text(row["sum"])


def _steps(row: dict[str, Any]) -> str:
    if "steps_to_best" not in row:
        return ""
    if row["steps_to_best"] is None:
        return "never"
    seconds = row.get("seconds_to_best")
    return f"{row['steps_to_best']:,.0f}" + (f" ({seconds:.2g} s)" if seconds else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_text(interval: dict[str, Any] | None, digits: int = 1) -> str:
    """A mean with half its interval, as ``"12.3 ± 0.4"``.

    Args:
        interval: ``mean`` and ``half`` of a summary; ``None`` for what was not measured gives "".
        digits: after the decimal point.
    """
    if interval is None:  # not measured
        return ""
    if interval["mean"] is None:
        return "diverged"
    mean = f"{interval['mean']:.{digits}f}"
    return mean if interval["half"] is None else f"{mean} ± {interval['half']:.{digits}f}"


def lr_text(row: dict[str, Any]) -> str:
    """The learning rate of a summary's row, with those of :data:`MARKS` that apply."""
    replaced = row.get("tuned_lr", row["lr"]) != row["lr"]
    return f"{row['lr']:g}" + "†" * replaced + "‡" * row.get("lr_at_edge", False)


def ratio_text(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval, as ``"0.61 [0.58, 0.64]"``, bold if below 1.

    Args:
        ratio: ``mean``, ``low`` and ``high`` of a summary; ``None``, where there was no baseline
            to compare with, gives "".
    """
    if ratio is None:
        return ""
    if ratio["mean"] is None:
        return "diverged"
    text = f"{ratio['mean']:.2f}"
    if ratio["low"] is not None and ratio["high"] is not None:
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"**{text}**" if ratio["mean"] < 1 else text


def _with_lr(row: dict[str, Any], best: bool) -> str:
    text = f"{_sum(row)} (lr {lr_text(row)})"
    return f"**{text}**" if best else text


def plot(summary: dict[str, Any], task: str, horizon: int, path: Path) -> None:
    """Learning curves of one task: log loss, learned solid, baselines dashed, 95 % shaded.

    Args:
        path: the image to write; its suffix says which kind.
    """
    from matplotlib.figure import Figure

    optimizers = summary["tasks"][task]["horizons"][str(horizon)]["optimizers"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    learned, baselines = _names(summary)
    for index, name in enumerate([*learned, *baselines]):
        _draw(axes, name, optimizers[name], COLOURS[index % len(COLOURS)])
    axes.set_xlim(0, horizon)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(f"{task}, mean of {summary['protocol']['seeds']} seeds")
    axes.grid(True, which="both", alpha=0.2)
    _set_log_axis(axes, optimizers)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, name: str, row: dict[str, Any], colour: str) -> None:
    """One optimizer's curve with its interval; it ends where a seed diverged."""
    step, mean, half = (
        [math.nan if x is None else x for x in row["curve"][part]]
        for part in ("step", "mean", "half")
    )
    is_learned = row["kind"] == "learned"
    axes.plot(
        step, mean,
        color=colour,
        linestyle="-" if is_learned else "--",
        linewidth=2.0 if is_learned else 1.3,
        label=f"{name} (learned)" if is_learned else f"{name} (lr {lr_text(row)})",
        zorder=3 if is_learned else 2,
    )  # fmt: skip
    # A log axis has no room for an interval that reaches below zero.
    low = [max(m - h, 0.05 * m) for m, h in zip(mean, half, strict=True)]
    high = [m + h for m, h in zip(mean, half, strict=True)]
    axes.fill_between(step, low, high, color=colour, alpha=0.15, lw=0)


def _set_log_axis(axes: Any, optimizers: dict[str, Any]) -> None:
    """Plain numbers, and a range that shows every curve from its start down."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    curves = [[m for m in row["curve"]["mean"] if m] for row in optimizers.values()]
    curves = [curve for curve in curves if curve]
    if not curves:  # everything diverged at once
        axes.text(0.5, 0.5, "no loss was finite", transform=axes.transAxes, ha="center")
        return
    axes.set_yscale("log")
    # Not the excursions far above the start: they would flatten everything else.
    low, high = 0.8 * min(map(min, curves)), 2.0 * max(curve[0] for curve in curves)
    top = 1.1 * max(map(max, curves))
    axes.set_ylim(low, min(high, top))
    within_three_decades = high < 1000 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within_three_decades else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def curve_file(task: str, horizon: int) -> str:
    """Name of the image of a task's learning curves; ``module:name`` becomes ``module.name``."""
    return f"{task.replace(':', '.')}-{horizon}.png"
