"""docs/performance.md: the targets, the figures behind them, and plots, from the JSON alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import half_state, kernel_step, lstm_kernel, meta_training_sizes, wall_clock
from learned_optim.summary import table

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "performance"
MILLION = "1,000,000"
NETWORK = "784-20-10 network (15,910)"
MISSING = "Not measured yet."


def load() -> dict[str, Any]:
    """What was found, by section; sections that were not measured are left out."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    return {name: each.get("found", each) for name, each in found.items()}


def targets(found: dict[str, Any]) -> str:
    """Every target beside what was measured."""
    rows = []
    for name, goal, bound, measured in _TARGETS:
        try:
            value = measured(found)
        except (KeyError, StopIteration):
            rows.append([name, goal, "not measured", ""])
            continue
        met = value >= bound if goal.startswith(">=") else value <= bound
        shown = f"{value:.2f}" if math.isfinite(value) else "never"
        rows.append([name, goal.replace(">=", "≥").replace("<=", "≤"), shown,
                     "met" if met else "**missed**"])  # fmt: skip
    return table(["", "target", "measured", ""], rows)


def _against_fused(network: str) -> Callable[[dict[str, Any]], float]:
    """The default's step in units of Adam's fused one, on one thread or two: the larger."""

    def measured(found: dict[str, Any]) -> float:
        rows = (row for row in found["kernel-step"]["rows"] if row["name"] == network)
        return max(row["optimizer"] / row["adam"] for row in rows)

    return measured


def _seconds_to_goal(task: str) -> Callable[[dict[str, Any]], float]:
    """Of the default, in units of Adam's with its fused step; infinite if it does not get there.

    Where Adam's fused step ends a hair above the loss of its plain one, its whole run counts.
    """

    def measured(found: dict[str, Any]) -> float:
        rows = found["wall_clock"]["tasks"][task]["optimizers"]
        ours, adam = rows["default"]["seconds_to_goal"], rows["adam, fused"]
        return math.inf if ours is None else ours / (adam["seconds_to_goal"] or adam["seconds"][-1])

    return measured


def _speedup(size: str) -> Callable[[dict[str, Any]], float]:
    def measured(found: dict[str, Any]) -> float:
        row = found["lstm-step"]["sizes"][size]
        return row["plain"] / row["fast"]

    return measured


def _compiled(rule: str, network: str) -> Callable[[dict[str, Any]], float]:
    """Of the pure form's time."""

    def measured(found: dict[str, Any]) -> float:
        rows = found["lstm-kernel"]["rows"]
        row = next(r for r in rows if r["rule"].startswith(rule) and r["network"] == network)
        return row["compiled"] / row["pure"]

    return measured


def _small_sizes(found: dict[str, Any]) -> float:
    rows = found["lstm-step"]["sizes"].values()
    return min(r["plain"] / r["fast"] for r in rows if r["coordinates"] < 10_000)


def _largest_temporary(found: dict[str, Any]) -> float:
    rows = (row for rule, row in found["temporaries"].items() if not rule.startswith("plain"))
    return max(value for row in rows for value in row.values()) / 2**20


def _many(rule: str) -> Callable[[dict[str, Any]], float]:
    def measured(found: dict[str, Any]) -> float:
        row = found["many-tensors"]["optimizers"][rule]
        return row["many"] / row["one"]

    return measured


def _fast_rule(found: dict[str, Any]) -> str:
    """The cheap checkpoint, or its rule before it is trained."""
    names = ("coordinatewise",)
    return next(name for name in names if name in found["checkpoints"])


def _against_adam(found: dict[str, Any]) -> float:
    rows = found["checkpoints"]
    return rows[_fast_rule(found)]["nanoseconds"] / rows["adam, foreach"]["nanoseconds"]


def _floats(found: dict[str, Any]) -> float:
    return found["checkpoints"][_fast_rule(found)]["bytes_per_parameter"] / 4


def _halved(found: dict[str, Any]) -> float:
    rows = found["checkpoints"]
    pairs = ((row, rows.get(f"{name}, bfloat16 state")) for name, row in rows.items())
    return max(
        half["bytes_per_parameter"] / row["bytes_per_parameter"] for row, half in pairs if half
    )


_SAMPLED, _ALL = "replay, 1,000 coordinates", "replay, all coordinates"


def _meta(key: str, how: str) -> Callable[[dict[str, Any]], float]:
    def measured(found: dict[str, Any]) -> float:
        runs = found["meta-training"]["runs"]
        plain, ours = runs["plain"][key], runs[how][key]
        return plain / ours if key == "seconds" else ours / plain

    return measured


def _batched(task: str) -> Callable[[dict[str, Any]], float]:
    def measured(found: dict[str, Any]) -> float:
        rates, together = (
            found["meta-training"]["batched"][task],
            found["meta-training"]["together"],
        )
        return rates[str(together)] / rates["1"]

    return measured


def _growth(rule: str) -> Callable[[dict[str, Any]], float]:
    """Cost per coordinate at the largest size measured against the smallest, on one thread."""

    def measured(found: dict[str, Any]) -> float:
        rows = list(found["scaling"][rule].values())
        return rows[-1]["1"] / rows[0]["1"]

    return measured


#: What is measured, the target in words and as a number, and how it is read off.
_TARGETS: list[tuple[str, str, float, Callable[[dict[str, Any]], float]]] = [
    ("default in units of Adam(fused=True), 784-20-10 network", "<= 0.6", 0.6,
     _against_fused("784-20-10 network")),
    ("the same, 66 mixed tensors", "<= 1.6", 1.6, _against_fused("66 mixed tensors")),
    ("the same, 1M in one tensor", "<= 2.0", 2.0, _against_fused("one tensor")),
    ("the same, 10M", "<= 2.5", 2.5, _against_fused("one large tensor")),
    ("default, seconds to tuned Adam's loss, in units of Adam(fused=True)'s: mnist", "< 1", 1,
     _seconds_to_goal("mnist")),
    ("the same, mnist-40", "< 1", 1, _seconds_to_goal("mnist-40")),
    ("the same, fashion", "< 1", 1, _seconds_to_goal("fashion")),
    ("the same, mnist-cnn", "< 1", 1, _seconds_to_goal("mnist-cnn")),
    ("2x20 step, times faster than plain, 1M coordinates", ">= 10", 10, _speedup(MILLION)),
    ("the same, 10M coordinates", ">= 10", 10, _speedup("10,000,000")),
    ("the same, 784-20-10 network", ">= 4", 4, _speedup(NETWORK)),
    ("the same, least below 10,000 coordinates", ">= 1", 1, _small_sizes),
    ("equivariant, 16 units, compiled against the pure form, 1M", "<= 0.6", 0.6,
     _compiled("equivariant", "one tensor")),
    ("the same, 784-20-10 network", "<= 0.6", 0.6,
     _compiled("equivariant", "784-20-10 network")),
    ("2x20 step in units of its matrix products, 1M", "<= 2.0", 2.0,
     lambda f: 1 / _speedup(MILLION)(f) * _ratio_plain_products(f)),
    ("temporary memory, MiB, largest of all rules", "<= 64", 64, _largest_temporary),
    ("66 tensors against one: 2x20", "<= 1.15", 1.15, _many("lstm")),
    ("66 tensors against one: equivariant", "<= 1.15", 1.15, _many("equivariant")),
    ("66 tensors against one: steered", "<= 1.15", 1.15, _many("steered")),
    ("66 tensors against one: horizon", "<= 1.15", 1.15, _many("horizon")),
    ("general-2-fast in units of Adam (foreach), 1M", "<= 5", 5, _against_adam),
    ("general-2-fast, floats of state per parameter", "<= 6", 6, _floats),
    ("bfloat16 state against float32, bytes, largest ratio", "<= 0.5", 0.501, _halved),
    ("meta-training as shipped (a sample of coordinates), times faster than plain", ">= 4", 4,
     _meta("seconds", _SAMPLED)),
    ("the same, peak memory against plain", "<= 0.2", 0.2, _meta("peak", _SAMPLED)),
    ("meta-training, every coordinate, times faster than plain", ">= 4", 4, _meta("seconds", _ALL)),
    ("the same, peak memory against plain", "<= 0.2", 0.2, _meta("peak", _ALL)),
    ("batched, times more optimizee-steps: quadratic", ">= 3", 3, _batched("quadratic")),
    ("batched, times more optimizee-steps: digits", ">= 3", 3, _batched("digits")),
    ("cost per coordinate, largest size against 10^4: 2x20", "<= 1.1", 1.1, _growth("lstm")),
    ("the same: equivariant", "<= 1.1", 1.1, _growth("equivariant")),
    ("the same: steered", "<= 1.1", 1.1, _growth("steered")),
    ("the same: horizon", "<= 1.1", 1.1, _growth("horizon")),
]  # fmt: skip


def _ratio_plain_products(found: dict[str, Any]) -> float:
    row = found["lstm-step"]["sizes"][MILLION]
    return row["plain"] / row["products"]


# ---- tables


def _lstm_table(found: dict[str, Any]) -> str:
    head = ["coordinates", "plain, ns", "ours, ns", "products alone, ns",
            "plain / ours", "ours / products"]  # fmt: skip
    rows = []
    for name, row in found["sizes"].items():
        plain = f"{row['plain']:,.0f}" + " (on 1M of them)" * row["plain_in_slices"]
        rows.append([name, plain, f"{row['fast']:,.0f}", f"{row['products']:,.0f}",
                     f"{row['plain'] / row['fast']:.1f}",
                     f"{row['fast'] / row['products']:.2f}"])  # fmt: skip
    return table(head, rows)


def _many_table(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['many']:.1f}", f"{row['one']:.1f}", f"{row['many'] / row['one']:.2f}"]
        for name, row in found["optimizers"].items()
    ]
    head = ["", f"{found['tensors']} tensors, ns", "one tensor, ns", "ratio"]
    return f"{found['coordinates']:,} coordinates.\n\n" + table(head, rows)


def _temporaries_table(found: dict[str, Any]) -> str:
    sizes = sorted({n for row in found.values() for n in row}, key=int)
    rows = [
        [name, *(f"{row[n] / 2**20:,.0f}" if n in row else "" for n in sizes)]
        for name, row in found.items()
    ]
    return table(["MiB", *(f"{int(n):,} coordinates" for n in sizes)], rows)


def _checkpoints_table(found: dict[str, Any]) -> str:
    adam = found["adam, foreach"]["nanoseconds"]
    rows = []
    for name, row in found.items():
        if name.endswith("bfloat16 state"):
            continue
        half = found.get(f"{name}, bfloat16 state")
        rows.append([name, f"{row['nanoseconds']:.1f}", f"{row['nanoseconds'] / adam:.1f}",
                     f"{row['bytes_per_parameter']:.0f}",
                     f"{half['nanoseconds']:.1f}" if half else "",
                     f"{half['bytes_per_parameter']:.0f}" if half else ""])  # fmt: skip
    head = ["", "ns per coordinate", "of Adam's (foreach)", "bytes of state per parameter",
            "with bfloat16 state: ns", "bytes"]  # fmt: skip
    return table(head, rows)


def _scaling_table(found: dict[str, Any]) -> str:
    head, rows = ["ns per coordinate", "threads"], []
    sizes = [str(10**k) for k in range(4, 9)]
    head += [f"10^{k}" for k in range(4, 9)]
    for name, by_size in found.items():
        last = list(by_size.values())[-1]
        for threads in last:
            cells = [
                f"{by_size[n][threads]:.1f}" if n in by_size else f"({last[threads]:.1f})"
                for n in sizes
            ]
            rows.append([name, threads, *cells])
    return table(head, rows)


def _meta_table(found: dict[str, Any]) -> str:
    plain = found["runs"]["plain"]
    rows = [
        [name, f"{row['seconds']:.1f}", f"{plain['seconds'] / row['seconds']:.1f}",
         f"{row['peak'] / 2**20:,.0f}", f"{plain['peak'] / row['peak']:.1f}"]
        for name, row in found["runs"].items()
    ]  # fmt: skip
    head = ["", "seconds per run", "times faster", "peak memory, MiB", "times less"]
    together = str(found["together"])
    batched = [
        [task, f"{rates['1']:,}", f"{rates[together]:,}", f"{rates[together] / rates['1']:.1f}"]
        for task, rates in found["batched"].items()
    ]
    second = ["optimizee-steps per second", "one at a time", f"{together} at once", "ratio"]
    return table(head, rows) + "\n\n" + table(second, batched)


def _wall_clock(found: dict[str, Any]) -> str:
    image = "![Loss against seconds](performance/wall_clock.png)"
    return f"{wall_clock.markdown(found)}\n\n{image}"


# ---- plots


def _draw_scaling(found: dict[str, Any], path: Path) -> None:
    """Nanoseconds per coordinate against size; one thread solid, two dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, rows) in enumerate(found.items()):
        for threads, style in (("1", "-"), ("2", "--")):
            points = [(int(n), row[threads]) for n, row in rows.items() if threads in row]
            if not points:
                continue
            label = f"{name}, {threads} thread{'s' * (threads != '1')}"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{index}", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("coordinates in one tensor")
    axes.set_ylabel("nanoseconds per coordinate and step")
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)


def _draw_speedup(found: dict[str, Any], path: Path) -> None:
    """The 2x20 step against the plain implementation and its own products."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = sorted(found["sizes"].values(), key=lambda row: row["coordinates"])
    sizes = [row["coordinates"] for row in rows]
    for key, label in (("plain", "plain: two LSTMCells"), ("fast", "this package"),
                       ("products", "its matrix products alone")):  # fmt: skip
        axes.plot(sizes, [row[key] for row in rows], marker="o", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("coordinates")
    axes.set_ylabel("nanoseconds per coordinate and step")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


# ---- the page

_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "lstm-step": _lstm_table,
    "many-tensors": _many_table,
    "temporaries": _temporaries_table,
    "checkpoints": _checkpoints_table,
    "scaling": _scaling_table,
    "meta-training": _meta_table,
    "meta-training-sizes": meta_training_sizes.markdown,
    "wall_clock": _wall_clock,
    "half-state": half_state.markdown,
    "kernel-step": kernel_step.markdown,
    "lstm-kernel": lstm_kernel.markdown,
}


def write_page() -> None:
    """docs/performance.md and its plots, from the template and what was measured."""
    found = load()
    text = (Path(__file__).parent / "performance_template.md").read_text()
    text = text.replace("{targets}", targets(found)).replace("{machine}", _machine())
    for name, body in _SECTIONS.items():
        text = text.replace(f"{{{name}}}", body(found[name]) if name in found else MISSING)
    if "scaling" in found:
        _draw_scaling(found["scaling"], FOLDER / "scaling.png")
    if "lstm-step" in found:
        _draw_speedup(found["lstm-step"], FOLDER / "lstm-step.png")
    if "wall_clock" in found:
        wall_clock.draw(found["wall_clock"], FOLDER / "wall_clock.png")
    (DOCS / "performance.md").write_text(text)


def _machine() -> str:
    """Where and when the figures were made."""
    seen = [json.loads(path.read_text()).get("machine") for path in FOLDER.glob("*.json")]
    lines = {
        f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, {m['date']}"
        for m in seen
        if m is not None
    }
    loads = [m["load"] for m in seen if m is not None]
    busy = f" The load average was {min(loads)} to {max(loads)} meanwhile." if loads else ""
    return "; ".join(sorted(lines)) + "." + busy
