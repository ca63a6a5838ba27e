"""A field's summary as Markdown tables and the plot of its performance profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learned_optim.checkpoint import write_text
from learned_optim.summary import COLOURS, MARKS, ratio_text, table, value_text

PROFILE_FILE = "profile.png"


def markdown(summary: dict[str, Any]) -> str:
    """Protocol, the two tables over all tasks, and the tables of every task."""
    parts = [
        describe(summary),
        "## Untuned against untuned\n\n" + untuned_table(summary),
        "Geometric mean of final losses, row over column; below 1 the row is ahead:\n\n"
        + pairs_table(summary),
        "## Untuned against tuned\n\n" + tuned_table(summary),
        "## By task\n\nFinal loss over that of the best tuned rival, which is named with its "
        "learning rate [95 % interval]:\n\n" + ratios_table(summary),
    ]
    parts += [f"### {task}\n\n" + task_table(summary, task) for task in summary["tasks"]]
    return "\n\n".join(parts) + "\n"


def brief(summary: dict[str, Any]) -> str:
    """How everybody did over all tasks, narrow enough for a terminal."""
    rows = []
    for name in (*summary["protocol"]["untuned"], *summary["protocol"]["tuned"]):
        row = summary["overall"][name]
        best = summary["profiles"]["untuned"].get(name, [None])[0]
        rows.append(
            [
                name,
                ratio_text(row["ratio"]) if "ratio" in row else "",
                ratio_text(row["test_ratio"]) if "test_ratio" in row else "",
                "" if best is None else f"{100 * best:.0f}%",
            ]
        )
    head = ["optimizer", "final loss / best tuned", "held-out loss", "best untuned on"]
    return "\n\n".join(part for part in (in_words(summary), table(head, rows)) if part) + "\n"


def describe(summary: dict[str, Any]) -> str:
    """What was run, in a paragraph, and who could not take part."""
    protocol = summary["protocol"]
    tier = "quick tier" if protocol["quick"] else "whole field"
    tasks, seeds = _counted(len(summary["tasks"]), "task"), _counted(protocol["seeds"], "test seed")
    text = (
        f"{tasks} ({tier}), {seeds}, learning rates of tuned rivals chosen from "
        f"{_listed(protocol['lr_grid'])} by the final loss on "
        f"{protocol['tuning_seeds']} other. The final loss is the mean over the last 5 % of the "
        f"steps. Means over tasks are geometric, of ratios cut off at 1/10 and 10; a run that "
        f"diverged counts as 10. Times are processor time of one thread. ‡: {MARKS['‡']}."
    )
    notes = [f"Without {name}: {why}." for name, why in protocol["skipped"].items()]
    return "\n\n".join([text, *notes])


def untuned_table(summary: dict[str, Any]) -> str:
    """Everything untuned: how often best, how near the best, and what it costs."""
    profile, factors = summary["profiles"]["untuned"], summary["profiles"]["factors"]
    head = ["optimizer", "best on", "within 1.1 times the best", "within 2 times", "diverged",
            "stalled", "optimizer ms per step", "state, MB over all tasks"]  # fmt: skip
    rows = []
    for name in summary["protocol"]["untuned"]:
        overall, shares = summary["overall"][name], profile[name]
        rows.append(
            [
                _name(summary, name),
                f"{shares[0]:.0%}",
                f"{shares[_at(factors, 1.1)]:.0%}",
                f"{shares[_at(factors, 2.0)]:.0%}",
                *_costs(overall),
            ]
        )
    return table(head, rows)


def tuned_table(summary: dict[str, Any]) -> str:
    """Everybody against the best tuned rival of each task."""
    if not any("ratio" in row for row in summary["overall"].values()):
        return "No tuned rival took part."
    head = ["optimizer", "final loss / best tuned [95 %]", "held-out loss", "summed loss",
            "at most the tuned one's", "within 5 %", "reaches it on", "share of its steps",
            "share of its time", "diverged", "stalled", "optimizer ms per step",
            "state, MB over all tasks"]  # fmt: skip
    rows = []
    for name in (*summary["protocol"]["untuned"], *summary["protocol"]["tuned"]):
        row = summary["overall"][name]
        count = row["tasks"]
        rows.append(
            [
                _name(summary, name),
                ratio_text(row["ratio"]),
                ratio_text(row["test_ratio"]),
                ratio_text(row["sum_ratio"]),
                f"{row['at_most_tuned']} of {count}",
                f"{row['within_5_percent']} of {count}",
                f"{row['reached']} of {count}",
                _share(row["step_share_to_target"]),
                _share(row["second_share_to_target"]),
                *_costs(row),
            ]
        )
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


def ratios_table(summary: dict[str, Any]) -> str:
    """Per task, everybody's final loss over the best tuned rival's."""
    names = (*summary["protocol"]["untuned"], *summary["protocol"]["tuned"])
    rows = []
    for task, entry in summary["tasks"].items():
        best, optimizers = entry["best_tuned"], entry["optimizers"]
        rival = f"{best} ({_lr(summary, optimizers[best]['lr'])})" if best else "none"
        cells = [_outcome(optimizers[name]) for name in names]
        rows.append([task, f"{entry['steps']:,}", rival, *cells])
    return table(["task", "steps", "best tuned rival", *names], rows)


def task_table(summary: dict[str, Any], task: str) -> str:
    """All figures of one task."""
    entry = summary["tasks"][task]
    optimizers = entry["optimizers"]
    tests = sorted({name for row in optimizers.values() for name in row["test"]})
    head = ["optimizer", "lr", "final loss", "summed loss", *(f"held-out {t}" for t in tests),
            "steps to the tuned one's final loss", "seconds", "ms per step", "of it the optimizer",
            "state, kB"]  # fmt: skip
    rows = []
    for name, row in optimizers.items():
        steps, seconds = row.get("steps_to_target"), row.get("seconds_to_target")
        rows.append(
            [
                _name(summary, name),
                _lr(summary, row["lr"])
                if name in summary["protocol"]["tuned"]
                else f"{row['lr']:g}",
                f"{row['diverged']} diverged" if row["diverged"] else value_text(row["final"], 4),
                value_text(row["sum"]),
                *(value_text(row["test"].get(test), 4) for test in tests),
                f"{steps:,.0f}" if steps else "never",
                f"{seconds:.2g}" if seconds else "never",
                value_text(row["milliseconds_per_step"], 2),
                value_text(row["optimizer_milliseconds"], 2),
                f"{row['state_bytes'] / 1000:,.0f}",
            ]
        )
    return f"{entry['steps']:,} steps\n\n" + table(head, rows)


def in_words(summary: dict[str, Any]) -> str:
    """Per learned optimizer, a sentence on each rival's table, and where it fails."""
    untuned, overall = summary["protocol"]["untuned"], summary["overall"]
    lines = []
    for name in summary["protocol"]["checkpoints"]:
        pairs, row = summary["untuned_pairs"][name], overall[name]
        ahead = [other for other in untuned if other in pairs and pairs[other]["mean"] < 1]
        behind = [other for other in untuned if other in pairs and other not in ahead]
        text = f"- `{name}`, untuned, is ahead of {_named(ahead)} in the geometric mean of final "
        text += f"losses, and behind {_named(behind)}."
        if "ratio" in row:
            text += (
                f" Its final loss is {row['ratio']['mean']:.2f} times the best tuned rival's, and "
                f"at most that rival's on {row['at_most_tuned']} of {row['tasks']} tasks."
            )
        failed = {
            kind: [t for t, e in summary["tasks"].items() if e["optimizers"][name][kind]]
            for kind in ("diverged", "stalled")
        }
        for kind, tasks in failed.items():
            text += f" It {kind} on {_named(tasks)}." if tasks else f" It never {kind}."
        lines.append(text)
    return "\n".join(lines)


def plot_profile(summary: dict[str, Any], path: Path) -> None:
    """Performance profiles over the whole field: learned solid, untuned dashed, tuned dotted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    protocol, profiles = summary["protocol"], summary["profiles"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, shares) in enumerate(profiles["all"].items()):
        learned, tuned = name in protocol["checkpoints"], name in protocol["tuned"]
        axes.plot(
            profiles["factors"], shares,
            color=COLOURS[index % len(COLOURS)],
            linestyle="-" if learned else ":" if tuned else "--",
            linewidth=2.4 if learned else 1.3,
            label=f"{name} (learned)" if learned else f"{name} (tuned)" if tuned else name,
            zorder=3 if learned else 2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(1, profiles["factors"][-1])
    axes.set_xticks([1, 1.1, 1.5, 2, 5, 10])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("final loss, times the smallest of all optimizers")
    axes.set_ylabel(f"share of {len(summary['tasks'])} tasks")
    axes.grid(True, alpha=0.2)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_report(summary: dict[str, Any], folder: Path) -> list[Path]:
    """``table.md`` and the performance profile in ``folder``; returns what was written."""
    written = [folder / "table.md", folder / PROFILE_FILE]
    write_text(written[0], markdown(summary))
    plot_profile(summary, written[1])
    return written


def _name(summary: dict[str, Any], name: str) -> str:
    """A learned optimizer in bold."""
    return f"**{name}**" if name in summary["protocol"]["checkpoints"] else name


def _lr(summary: dict[str, Any], lr: float) -> str:
    """A tuned learning rate, marked where it is at an edge of the grid."""
    grid = summary["protocol"]["lr_grid"]
    return f"{lr:g}" + "‡" * (lr in (grid[0], grid[-1]))


def _outcome(row: dict[str, Any]) -> str:
    """The ratio of one optimizer on one task, or on how many seeds it diverged or stalled."""
    if row["diverged"]:
        return f"{row['diverged']} diverged"
    stalled = f" ({row['stalled']} stalled)" if row["stalled"] else ""
    return ratio_text(row.get("ratio")) + stalled


def _costs(row: dict[str, Any]) -> list[str]:
    """Failures, time and memory of one optimizer over all tasks."""
    spent = row["optimizer_milliseconds"]
    return [
        f"{row['diverged']:.0%}",
        f"{row['stalled']:.0%}",
        "" if spent is None else f"{spent:.2f}",
        f"{row['state_bytes'] / 1e6:.2f}",
    ]


def _named(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _share(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"


def _at(factors: list[float], factor: float) -> int:
    """Index of the largest of ``factors`` that is at most ``factor``."""
    return max(i for i, f in enumerate(factors) if f <= factor + 1e-9)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
