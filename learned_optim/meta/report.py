"""An evaluation's summary as Markdown tables and learning-curve plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Colours of Okabe and Ito (2008), told apart by readers with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")


def markdown(summary: dict[str, Any]) -> str:
    """The tables: one overview per horizon, then the figures of every task."""
    protocol = summary["protocol"]
    seeds = f"{protocol['seeds']} test seeds, learning rates tuned on {protocol['tuning_seeds']}"
    parts = [f"Mean ± half the 95 % interval; {seeds} others."]
    for horizon in protocol["horizons"]:
        parts.append(f"## Summed loss over {horizon:,} steps\n\n" + _overview(summary, horizon))
    for task, entry in summary["tasks"].items():
        parts.append(f"## {task}\n\n" + "\n\n".join(_detail(h, v) for h, v in entry["horizons"].items()))
    return "\n\n".join(parts) + "\n"


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
                *(_value(cell["optimizers"][name]["sum"]) for name in learned),
                *(_ratio(cell["optimizers"][name].get("ratio")) for name in learned),
                *(_with_lr(cell["optimizers"][name], name == cell["best_baseline"]) for name in baselines),
            ]
        )
    return table(head, rows)


def _detail(horizon: str, cell: dict[str, Any]) -> str:
    """All figures of one task at one horizon."""
    optimizers = cell["optimizers"]
    some = next(iter(optimizers.values()))
    head = ["optimizer", "lr", "summed loss", "last 10 steps", "lr by last 10", "last 10 so tuned"]
    tests = sorted(some.get("test", {}))
    head += [f"test {name}" for name in tests]
    if "worst_after_1000" in some:
        head.append("worst after step 1,000")
    head.append("steps to best baseline's last 10")
    rows = []
    for name, row in optimizers.items():
        final = row.get("tuned_by_final")
        line = [
            f"**{name}**" if row["kind"] == "learned" else name,
            f"{row['lr']:g}",
            _value(row["sum"]),
            _value(row["last"], 3),
            f"{final['lr']:g}" if final else "",
            _value(final["last"], 3) if final else "",
        ]
        line += [_value(row["test"][t], 3) for t in tests]
        if "worst_after_1000" in some:
            line.append(_value(row["worst_after_1000"], 3))
        steps = row.get("steps_to_best", "")
        line.append("never" if steps is None else f"{steps:.0f}" if steps != "" else "")
        rows.append(line)
    return f"{int(horizon):,} steps\n\n" + table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(interval: dict[str, Any], digits: int = 1) -> str:
    if interval["mean"] is None:
        return "diverged"
    return f"{interval['mean']:.{digits}f} ± {interval['half'] or 0.0:.{digits}f}"


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    if ratio["mean"] is None:
        return "diverged"
    text = f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"**{text}**" if ratio["mean"] < 1 else text


def _with_lr(row: dict[str, Any], best: bool) -> str:
    text = f"{_value(row['sum'])} (lr {row['lr']:g})"
    return f"**{text}**" if best else text


def plot(summary: dict[str, Any], task: str, horizon: int, path: Path) -> None:
    """Learning curves of one task: log loss, learned solid, baselines dashed, 95 % shaded.

    Args:
        path: the image to write; its suffix says which kind.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cell = summary["tasks"][task]["horizons"][str(horizon)]
    learned, baselines = _names(summary)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate([*learned, *baselines]):
        row = cell["optimizers"][name]
        curve = row["curve"]
        known = [i for i, mean in enumerate(curve["mean"]) if mean is not None]
        step = [curve["step"][i] for i in known]
        mean = [curve["mean"][i] for i in known]
        half = [curve["half"][i] or 0.0 for i in known]
        is_learned = row["kind"] == "learned"
        axes.plot(
            step, mean,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle="-" if is_learned else "--",
            linewidth=2.0 if is_learned else 1.3,
            label=f"{name} (learned)" if is_learned else f"{name} (lr {row['lr']:g})",
            zorder=3 if is_learned else 2,
        )  # fmt: skip
        low = [max(m - h, m * 0.05) for m, h in zip(mean, half, strict=True)]
        high = [m + h for m, h in zip(mean, half, strict=True)]
        axes.fill_between(step, low, high, color=_COLOURS[index % len(_COLOURS)], alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set_ylim(*_limits(cell["optimizers"]))
    axes.set_xlim(0, horizon)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(task)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    axes.yaxis.set_major_formatter(mpl.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _limits(optimizers: dict[str, Any]) -> tuple[float, float]:
    """Loss range that shows every curve from its start down, but no excursion far above it."""
    means = [[m for m in row["curve"]["mean"] if m] for row in optimizers.values()]
    starts = [curve[0] for curve in means if curve]
    lows = [min(curve) for curve in means if curve]
    return min(lows) * 0.8, max(starts) * 2.0


def write_report(summary: dict[str, Any], folder: Path) -> list[Path]:
    """``table.md`` and one PNG per task and horizon in ``folder``; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "table.md"]
    written[0].write_text(markdown(summary))
    for task in summary["tasks"]:
        for horizon in summary["protocol"]["horizons"]:
            path = folder / f"{task}-{horizon}.png"
            plot(summary, task, horizon, path)
            written.append(path)
    return written
