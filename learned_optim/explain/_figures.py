"""The plots of a report. matplotlib comes with the ``meta`` extra."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learned_optim.explain._probe import Curve, Dependence, Watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"learned": "C3", "Adam": "C0", "RMSprop": "C2", "momentum": "C7"}
_LAYERS = ("C0", "C1", "C2", "C4", "C5", "C6")
_SMOOTHED = 10  # steps over which noisy courses are averaged


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of panels in rows of at most three."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window

    columns = min(3, count) if count != 4 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for spare in grid.flat[count:]:
        spare.set_visible(False)
    return figure, list(grid.flat[:count])


def _save(figure: Any, path: Path) -> None:
    """A PNG of 64 colours: a fifth of the size in version control."""
    from PIL import Image  # matplotlib needs it as well

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def _legend(figure: Any, *panels: Axes) -> None:
    """Legends of one or two panels, above and below all panels."""
    for axes, place in zip(panels, ("outside upper center", "outside lower center"), strict=False):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc=place, ncols=min(6, len(labels)), fontsize=8)


def _label(axes: Axes, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def _smooth(values: Iterable[float]) -> list[float]:
    """Means over the last ``_SMOOTHED`` values."""
    kept = list(values)
    windows = [kept[max(0, end - _SMOOTHED) : end] for end in range(1, len(kept) + 1)]
    return [sum(window) / len(window) for window in windows]


def plot_histories(curves: dict[str, Curve], path: Path) -> None:
    """Descent against the current gradient, a panel per history."""
    figure, panels = _panels(len(curves))
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        for rule, descent in curve.descent.items():
            width = 2.0 if rule == "learned" else 1.0
            style = "--" if rule == "momentum" else "-"  # often lies on Adam's line
            axes.plot(curve.gradient, descent, style, color=_COLOURS[rule], lw=width, label=rule)
        axes.axhline(0, color="0.8", lw=0.6, zorder=0)
        axes.axvline(0, color="0.8", lw=0.6, zorder=0)
        if name == "suddenly large":  # momentum would leave the picture
            bounded = [d for r, ds in curve.descent.items() if r != "momentum" for d in ds]
            margin = 0.1 * (max(bounded) - min(bounded))
            axes.set_ylim(min(bounded) - margin, max(bounded) + margin)
        _label(axes, name, "current gradient", "step downhill / scale")
    _legend(figure, panels[0])
    _save(figure, path)


def plot_run(runs: dict[str, Watched], path: Path) -> None:
    """Losses, relative steps and effective learning rates of every layer."""
    learned = {name: run for name, run in runs.items() if not name.startswith("Adam")}
    figure, (first, *rest) = _panels(1 + 2 * len(learned))
    for name, run in runs.items():
        style, width = (":", 1.0) if name.startswith("Adam") else ("-", 1.8)
        first.semilogy(_smooth(run.losses), label=name, ls=style, lw=width)
    _label(first, "loss", "step")
    for index, (name, run) in enumerate(learned.items()):
        ratio, effective = rest[2 * index : 2 * index + 2]
        for colour, (tensor, numbers) in zip(_LAYERS, run.numbers.items(), strict=False):
            ratio.semilogy(
                _smooth(max(n["step_ratio"], 1e-7) for n in numbers), color=colour, label=tensor,
                lw=1.0,
            )  # fmt: skip
            rates = _smooth(n["effective_lr"] for n in numbers)
            # Where steps went up the batch's gradient the logarithm has a gap.
            effective.semilogy([r if r > 0 else math.nan for r in rates], color=colour, lw=1.0)
        _label(ratio, f"step / parameter\n{name}", "step")
        _label(effective, f"effective learning rate\n{name}", "step")
    _legend(figure, first, rest[0])
    _save(figure, path)


def gain_shares(numbers: dict[str, float]) -> dict[str, float]:
    """Shares of the directions in a step; negative against the direction."""
    parts = {key[5:]: value for key, value in numbers.items() if key.startswith("part/")}
    total = sum(parts.values()) or 1.0
    return {k: math.copysign(part, numbers[f"gain/{k}"]) / total for k, part in parts.items()}


def plot_gains(run: Watched, path: Path) -> bool:
    """Shares of directions over a run; false for a single direction."""
    tensors = list(run.numbers.items())[:6]
    if len(gain_shares(tensors[0][1][0])) < 2:
        return False
    figure, panels = _panels(len(tensors))
    for axes, (tensor, numbers) in zip(panels, tensors, strict=True):
        shares = [gain_shares(step) for step in numbers]
        for direction in shares[0]:
            axes.plot(_smooth(step[direction] for step in shares), label=direction, lw=1.2)
        axes.axhline(0, color="0.8", lw=0.6, zorder=0)
        axes.set_ylim(-1.05, 1.05)
        _label(axes, tensor, "step", "share of the step")
    _legend(figure, panels[0])
    _save(figure, path)
    return True


def plot_dependence(found: Dependence, path: Path) -> None:
    """Four panels: scale, shape, signal, progress."""
    figure, (scale, shape, signal, progress) = _panels(4)
    scale.loglog(list(found.scale), list(found.scale.values()), "o-", color="C3", ms=3)
    least, most = min(found.scale.values()), max(found.scale.values())
    if most < 2 * least:  # rounding is not to fill the picture
        scale.set_ylim(least / 2, 2 * most)
    _label(scale, "tensor's scale", "scale / usual scale of the shape", "step / usual scale")
    shape.barh(list(found.shape), list(found.shape.values()), color="C3")
    _label(shape, "shape", "step / scale")
    signal.plot(*zip(*found.signal.items(), strict=True), "o-", color="C3", ms=3, label="learned")
    signal.plot(*zip(*found.signal_adam.items(), strict=True), "C0", label="Adam")
    _label(signal, "signal in the gradient", "amplitude of what stays the same", "step / scale")
    if found.known:
        progress.semilogy(found.known, "C3", label=f"total_steps={len(found.known)}")
    progress.semilogy(found.unknown, "C1", label="length unknown")
    _label(progress, "progress", "step", "step / scale")
    _legend(figure, progress, signal)
    _save(figure, path)
