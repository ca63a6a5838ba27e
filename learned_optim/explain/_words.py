"""Sentences about a rule, computed from the measurements."""

from __future__ import annotations

from learned_optim.explain._dependence import Dependence
from learned_optim.explain._histories import Curve
from learned_optim.explain._runs import ADAM_LRS, Watched

#: Ratios nearer to 1 than this count as equal.
_LEVEL = 1.1


def in_short(curves: dict[str, Curve], found: Dependence) -> list[str]:
    """How the steps depend on the history, the tensor's scale, noise and progress."""
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
            f"Told a length of {found.horizon} steps, it ends with a step of "
            f"{found.known[-1] / max(found.known):.2g} of its largest."
        )
    return lines


def _compared(ratio: float) -> str:
    if 1 / _LEVEL < ratio < _LEVEL:
        return "equal"
    return f"{ratio:.2g} times as large"


def of_run(runs: dict[str, Watched]) -> list[str]:
    """Final losses on the digits, and the layers with the smallest and largest steps."""
    best = min((f"Adam {lr:g}" for lr in ADAM_LRS), key=lambda name: runs[name].final)
    lines = []
    for name, run in runs.items():
        if name.startswith("Adam"):
            continue
        middle = len(run.losses) // 2
        steps = {tensor: found[middle]["step_ratio"] for tensor, found in run.numbers.items()}
        small, large = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        lines.append(
            f"{name.capitalize()}, the final loss is {run.final:.3g}; that of the best of "
            f"{len(ADAM_LRS)} Adams ({best.removeprefix('Adam ')}) is {runs[best].final:.3g}. Half "
            f"way through, steps are {steps[small]:.2g} of the tensor for `{small}` and "
            f"{steps[large]:.2g} for `{large}`."
        )
    return lines
