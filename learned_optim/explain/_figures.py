"""The plots of a report. matplotlib comes with the ``meta`` extra."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learned_optim.explain._ablation import Ablation
from learned_optim.explain._dependence import Dependence, Response
from learned_optim.explain._histories import Curve
from learned_optim.explain._runs import Watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"learned": "C3", "Adam": "C0", "RMSprop": "C2", "momentum": "C7"}
_LAYERS = ("C0", "C1", "C2", "C4", "C5", "C6")
_SMOOTHED = 10  # steps over which noisy courses are averaged


def _grid(rows: int, columns: int, width: float = 3.2, height: float = 2.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no window

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of panels in rows of at most three: wider ones are illegible on a page."""
    columns = min(3, count) if count != 4 else 2
    figure, grid = _grid(math.ceil(count / columns), columns)
    for spare in grid.flat[count:]:
        spare.set_visible(False)
    return figure, list(grid.flat[:count])


def _save(figure: Any, path: Path) -> None:
    """A PNG of 64 colours, a third of the usual size: reports are kept under version control."""
    from PIL import Image  # matplotlib needs it as well

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def _style(rule: str) -> dict[str, Any]:
    """Of a rule's line; momentum is dashed, because it often lies on Adam's."""
    return {
        "color": _COLOURS[rule],
        "lw": 2.0 if rule == "learned" else 1.0,
        "ls": "--" if rule == "momentum" else "-",
    }


def _label(axes: Axes, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def _smooth(values: Iterable[float], width: int = _SMOOTHED) -> list[float]:
    kept = list(values)
    return [sum(kept[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(kept))]


def plot_histories(curves: dict[str, Curve], path: Path) -> None:
    """Descent against the current gradient, a panel per history."""
    figure, panels = _panels(len(curves))
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        for rule, descent in curve.descent.items():
            axes.plot(curve.gradient, descent, label=rule, **_style(rule))
        axes.axhline(0, color="0.8", lw=0.6, zorder=0)
        axes.axvline(0, color="0.8", lw=0.6, zorder=0)
        if name == "suddenly large":  # momentum follows the gradient out of the picture
            bounded = [d for r, ds in curve.descent.items() if r != "momentum" for d in ds]
            margin = 0.1 * (max(bounded) - min(bounded))
            axes.set_ylim(min(bounded) - margin, max(bounded) + margin)
        _label(axes, name, "current gradient", "step downhill / scale")
    panels[0].legend(fontsize=8)
    _save(figure, path)


def plot_run(runs: dict[str, Watched], path: Path) -> None:
    """Losses, relative steps and effective learning rates of every layer."""
    learned = {name: run for name, run in runs.items() if not name.startswith("Adam")}
    figure, (first, *rest) = _panels(1 + 2 * len(learned))
    for name, run in runs.items():
        style, width = (":", 1.0) if name.startswith("Adam") else ("-", 1.8)
        first.semilogy(_smooth(run.losses), label=name, ls=style, lw=width)
    _label(first, "loss", "step")
    first.legend(fontsize=8)
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
    rest[0].legend(fontsize=8)
    _save(figure, path)


def gain_shares(numbers: dict[str, float]) -> dict[str, float]:
    """What each direction adds to a step, as a share of all, negative where it goes against it."""
    parts = {
        key.removeprefix("part/"): value for key, value in numbers.items() if key[:5] == "part/"
    }
    total = sum(parts.values()) or 1.0
    return {
        name: (1.0 if numbers[f"gain/{name}"] >= 0 else -1.0) * value / total
        for name, value in parts.items()
    }


def plot_gains(run: Watched, path: Path) -> None:
    """Shares of the directions in the step over a run, a panel per tensor."""
    tensors = list(run.numbers.items())[:6]
    figure, panels = _panels(len(tensors))
    for axes, (tensor, numbers) in zip(panels, tensors, strict=True):
        shares = [gain_shares(step) for step in numbers]
        for direction in shares[0]:
            axes.plot(_smooth(step[direction] for step in shares), label=direction, lw=1.2)
        axes.axhline(0, color="0.8", lw=0.6, zorder=0)
        axes.set_ylim(-1.05, 1.05)
        _label(axes, tensor, "step", "share of the step")
    panels[0].legend(fontsize=8)
    _save(figure, path)


def plot_responses(responses: dict[str, Response], path: Path) -> None:
    """What one event changes afterwards."""
    with_state = any(response.network for response in responses.values())
    figure, grid = _panels(2 * len(responses) if with_state else len(responses))
    panels = iter(grid)
    for kind, response in responses.items():
        axes = next(panels)
        for rule, values in response.update.items():
            axes.plot(values, label=rule, **_style(rule))
        axes.axhline(0, color="0.8", lw=0.6, zorder=0)
        _label(axes, f"{kind}: change of the update", "steps since", "in usual steps")
        if with_state:
            axes = next(panels)
            axes.plot(response.network, color="C3")
            _label(axes, f"{kind}: change of the state", "steps since", "relative")
    grid[0].legend(fontsize=8)
    _save(figure, path)


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
    signal.plot(list(found.signal), list(found.signal.values()), "o-", color="C3", ms=3)
    signal.plot(list(found.signal_adam), list(found.signal_adam.values()), "C0", label="Adam")
    _label(signal, "signal in the gradient", "amplitude of what stays the same", "step / scale")
    signal.legend(fontsize=8)
    if found.known:
        progress.semilogy(found.known, "C3", label=f"total_steps={found.horizon}")
    progress.semilogy(found.unknown, "C1", label="length unknown")
    _label(progress, "progress", "step", "step / scale")
    progress.legend(fontsize=8)
    _save(figure, path)


def plot_ablation(found: Ablation, path: Path) -> None:
    """Ratios of final losses without each input and each unit."""
    figure, grid = _grid(1, 2, width=4.2, height=0.6 + 0.16 * len(found.inputs))
    for axes, changes, title in zip(
        grid[0], (found.inputs, found.units), ("input", "unit"), strict=True
    ):
        shown = changes[:24][::-1]
        low = [change.ratio - change.best for change in shown]
        high = [change.worst - change.ratio for change in shown]
        axes.barh(
            [change.name for change in shown],
            [change.ratio - 1 for change in shown],
            left=1,
            xerr=[low, high],
            color="C3",
            error_kw={"lw": 0.7, "ecolor": "0.4"},
        )
        axes.axvline(1, color="0.6", lw=0.6)
        _label(axes, f"without one {title}", "final loss / final loss with all")
    _save(figure, path)
