"""The report on a checkpoint: Markdown and plots in a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from learned_optim import load_rule
from learned_optim.checkpoint import write_text
from learned_optim.explain import _figures, _probe
from learned_optim.summary import table

REPORT = "README.md"
#: Ratios nearer to 1 than this count as equal.
LEVEL = 1.1


def explain(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a report on what a checkpoint's update rule does.

    Args:
        checkpoint: as for :func:`learned_optim.load_rule`.
        output: folder of the report, made if missing; an earlier report in it is replaced.
        progress: called with the name of every finished measurement.

    Returns:
        The report, ``README.md`` in the folder.

    Raises:
        ValueError: unknown name, or a file that is no checkpoint.
        OSError: a file cannot be read or written.
        ImportError: matplotlib is missing; the extra ``meta`` installs it.

    Example:
        >>> explain("default", "runs/explain")  # doctest: +SKIP
    """
    import matplotlib  # noqa: F401 - an error before anything is computed

    rule, name, folder = load_rule(checkpoint), os.fspath(checkpoint), Path(output)
    count = sum(p.numel() for p in rule.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Probes may be longer than the runs of the meta-training.
        warnings.filterwarnings("ignore", "step .* is past", UserWarning)
        by_history = _probe.curves(rule)
        progress("response to the current gradient")
        by_variable = _probe.dependence(rule)
        progress("scale, shape, noise and progress")
        runs = _probe.watch_digits(rule)
        progress("training runs")
    _figures.plot_histories(by_history, folder / "histories.png")
    _figures.plot_dependence(by_variable, folder / "dependence.png")
    _figures.plot_run(runs, folder / "run.png")
    sections = [
        f"# What `{name}` has learned\n\nAn update rule of type `{rule.name}` with {count:,} "
        f"weights, fingerprint `{rule.fingerprint()}`. `learned-optim explain {name}` computed "
        f"everything here, words included. The runs show what the rule does, not how well; "
        f"`learned-optim evaluate` measures that.",
        _bullets(_in_short(by_history, by_variable)),
        f"## The step as a function of the current gradient\n\nA tensor of 32 x 32 sees a hundred "
        f"gradients of one kind; then one gradient is varied. The learning rates of the "
        f"hand-written rules give steps as large as the learned ones on typical gradients: mean "
        f"square 1, a constant part of 0.3.\n\n![Step against current gradient](histories.png)"
        f"\n\n{_sizes(by_history)}",
        "## Scale, shape, noise, progress\n\nThe step after a hundred typical gradients, one "
        "variable at a time.\n\n![Dependence](dependence.png)",
        f"## A training run\n\nA 64-32-32-10 ReLU network on scikit-learn's digits, batches of 64, "
        f"{_probe.WATCHED_STEPS} steps, one seed. The effective learning rate is that of a "
        f"gradient descent that goes as far along the gradient.\n\n![Loss, relative step and "
        f"effective learning rate](run.png)\n\n{_bullets(_of_run(runs))}",
    ]
    if _figures.plot_gains(next(iter(runs.values())), folder / "gains.png"):
        sections.append(
            "The share of each direction in the step, over the same run; a negative share goes "
            "against the direction.\n\n![Gains over time](gains.png)"
        )
    write_text(folder / REPORT, "\n\n".join(sections) + "\n")
    return folder / REPORT


def _in_short(curves: dict[str, _probe.Curve], found: _probe.Dependence) -> list[str]:
    """Sentences on history, noise, the tensor's scale and progress."""
    steps = {name: curve.size["learned"] / curve.size["Adam"] for name, curve in curves.items()}
    growth = found.scale[3.0] / found.scale[0.3]
    noise, adam = (sizes[0.05] / sizes[1.0] for sizes in (found.signal, found.signal_adam))
    lines = [
        f"Beside an Adam with equal steps on typical gradients, its steps are "
        f"{_compared(steps['constant'])} where gradients repeat, {_compared(steps['noisy'])} where "
        f"they are noise and {_compared(steps['alternating'])} where they alternate.",
        f"On gradients that are nearly all noise, its steps are {noise:.2g} of those on gradients "
        f"that repeat; Adam's are {adam:.2g}.",
        f"Ten times the tensor's scale gives steps {growth:.2g} times as large; Adam's are equal.",
    ]
    if found.known:
        lines.append(
            f"Told a length of {len(found.known)} steps, it ends with a step of "
            f"{found.known[-1] / max(found.known):.2g} of its largest."
        )
    return lines


def _compared(ratio: float) -> str:
    return "equal" if 1 / LEVEL < ratio < LEVEL else f"{ratio:.2g} times as large"


def _of_run(runs: dict[str, _probe.Watched]) -> list[str]:
    """Sentences on final losses and on the layers' steps."""
    best = min((f"Adam {lr:g}" for lr in _probe.ADAM_LRS), key=lambda name: runs[name].final)
    lines = []
    for name, run in runs.items():
        if name.startswith("Adam"):
            continue
        middle = len(run.losses) // 2
        steps = {tensor: found[middle]["step_ratio"] for tensor, found in run.numbers.items()}
        small, large = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        lines.append(
            f"{name.capitalize()}, the final loss is {run.final:.3g}; that of the best of "
            f"{len(_probe.ADAM_LRS)} Adams ({best.removeprefix('Adam ')}) is "
            f"{runs[best].final:.3g}. Half way through, steps are {steps[small]:.2g} of the tensor "
            f"for `{small}` and {steps[large]:.2g} for `{large}`."
        )
    return lines


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _sizes(found: dict[str, _probe.Curve]) -> str:
    """A table of step sizes at the end of every history."""
    rules = list(next(iter(found.values())).size)
    rows = [
        [name, *(f"{curve.size[rule]:.2g}" for rule in rules)]
        for name, curve in found.items()
        if name != "suddenly large"
    ]
    return table(["root mean square step / scale", *rules], rows)
