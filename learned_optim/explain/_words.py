"""Sentences about a rule, computed from what was measured."""

from __future__ import annotations

from learned_optim.explain._ablation import Ablation
from learned_optim.explain._dependence import Dependence, Response
from learned_optim.explain._histories import Curve
from learned_optim.explain._runs import ADAM_LRS, Watched

# Ratios nearer to 1 than this are called level.
_LEVEL = 1.1


def times(ratio: float) -> str:
    """``2.3 times`` or ``about as large as``, to be followed by what it is compared with."""
    if 1 / _LEVEL < ratio < _LEVEL:
        return "about as large as"
    return f"{ratio:.2g} times as large as"


def in_short(curves: dict[str, Curve], found: Dependence) -> list[str]:
    """What the rule does, and where it differs from Adam."""
    sizes = {name: curve.size["learned"] / curve.size["Adam"] for name, curve in curves.items()}
    ratio = _slope(curves["noisy"], "learned") / _slope(curves["noisy"], "Adam")
    growth = found.scale[3.0] / found.scale[0.3]
    lines = [
        f"Beside an Adam whose steps are as large on typical gradients, it takes "
        f"{_longer(sizes['constant'])} steps where gradients repeat, {_longer(sizes['noisy'])} "
        f"ones where they are noise and {_longer(sizes['alternating'])} ones where they alternate.",
        f"On noise, the gradient of this very step counts {_more(ratio)} in Adam; the rest of the "
        f"step is the history's.",
        _scaling(growth),
    ]
    if found.known:
        lines.append(
            f"It anneals by itself: told a length of {found.horizon} steps, the last is "
            f"{found.known[-1] / max(found.known):.2g} of the longest."
        )
    return lines


def _scaling(growth: float) -> str:
    if growth > _LEVEL:
        return (
            f"Steps grow with the tensor: about its usual scale, by a factor of {growth:.2g} where "
            f"the tensor's is 10. Adam's do not."
        )
    return f"Where a tensor grows by 10, its steps grow by a factor of {growth:.2g}; Adam's stay."


def _longer(ratio: float) -> str:
    if 1 / _LEVEL < ratio < _LEVEL:
        return "equal"
    return f"longer ({ratio:.2g} times)" if ratio > 1 else f"shorter ({ratio:.2g} times)"


def _more(ratio: float) -> str:
    if 1 / _LEVEL < ratio < _LEVEL:
        return "as much as"
    return f"{ratio:.2g} times as much as"


def _slope(curve: Curve, rule: str) -> float:
    """Change of the step per unit of the current gradient, in usual steps."""
    return (curve.at(rule, 1.0) - curve.at(rule, -1.0)) / 2 / curve.size[rule]


def of_histories(curves: dict[str, Curve]) -> list[str]:
    """What differs from Adam, history by history."""
    sizes = [
        f"{curves[name].size['learned'] / curves[name].size['Adam']:.2g} after {article} {name} one"
        for name, article in (("constant", "a"), ("alternating", "an"), ("decaying", "a"))
    ]
    noisy = curves["noisy"]
    large = curves["suddenly large"]
    learned, adam = (large.at(rule, 30.0) / large.at(rule, 3.0) for rule in ("learned", "Adam"))
    return [
        f"At the end of the history its steps are "
        f"{noisy.size['learned'] / noisy.size['Adam']:.2g} times Adam's after a noisy history, "
        f"{', '.join(sizes)}.",
        f"After noise, a gradient one standard deviation larger lengthens the step by "
        f"{_slope(noisy, 'learned'):.2g} usual steps; with Adam by {_slope(noisy, 'Adam'):.2g}.",
        f"A gradient that is suddenly thirty times the usual one moves a coordinate {learned:.2g} "
        f"times as far as one three times the usual; with Adam the factor is {adam:.2g}.",
    ]


def of_dependence(found: Dependence) -> list[str]:
    """Scale, shape, noise, progress."""
    low, high = found.scale[0.3], found.scale[3.0]
    shapes = sorted(found.shape.items(), key=lambda item: item[1])
    (small, least), (large, most) = shapes[0], shapes[-1]
    noise, adam = (s[0.05] / s[1.0] for s in (found.signal, found.signal_adam))
    lines = [
        f"Three times above its usual scale a tensor is given steps {high / low:.2g} times as "
        f"large as three times below it (Adam: 1; in proportion: 10). At a thousandth of it, steps "
        f"are {found.scale[0.001] / 0.001:.2g} times the tensor, at ten times the usual scale "
        f"{found.scale[10.0] / 10:.2g} times.",
        f"By shape, steps go from {least:.2g} of the scale ({small}) to {most:.2g} ({large}).",
        f"Where nearly all of the gradient is noise, steps are {noise:.2g} of those on gradients "
        f"that repeat; Adam's {adam:.2g}.",
    ]
    if found.known:
        peak = max(range(len(found.known)), key=found.known.__getitem__)
        lines.append(
            f"Told a length of {found.horizon} steps, it takes its longest step at step {peak + 1} "
            f"and ends at {found.known[-1] / max(found.known):.2g} of it; the smallest after that "
            f"peak is {min(found.known[peak:]) / max(found.known):.2g}, at step "
            f"{peak + 1 + min(range(len(found.known) - peak), key=found.known[peak:].__getitem__)}."
        )
    early, late = found.unknown[4], sum(found.unknown[-20:]) / 20
    lines.append(
        f"Not told a length, its fifth step is {times(early / late)} those after "
        f"{found.horizon} steps."
    )
    return lines


def of_responses(responses: dict[str, Response]) -> list[str]:
    """How long an event is remembered."""
    impulse = responses["impulse"]
    learned, adam = (_memory(impulse.update[rule]) for rule in ("learned", "Adam"))
    lines = [
        f"One gradient that is larger by three standard deviations changes the updates by more "
        f"than a tenth of the largest change for {learned}; with Adam for {adam}."
    ]
    if impulse.network:
        peak = max(impulse.network)
        lines.append(
            f"It changes the network's state by up to {peak:.2g} of its size, and by "
            f"{impulse.network[-1]:.2g} after {len(impulse.network)} steps."
        )
    return lines


def _memory(change: list[float]) -> str:
    peak = max(map(abs, change))
    kept = [step for step, value in enumerate(change) if abs(value) > 0.1 * peak]
    steps = kept[-1] + 1 if kept else 0
    return f"at least {steps} steps" if steps == len(change) else f"{steps} steps"


def of_run(runs: dict[str, Watched]) -> list[str]:
    """The digits classifier: final losses, and how the layers are treated."""
    best = min((f"Adam {lr:g}" for lr in ADAM_LRS), key=lambda name: runs[name].final)
    lines = []
    for name, run in runs.items():
        if name.startswith("Adam"):
            continue
        ratio = run.final / runs[best].final
        lines.append(
            f"{name.capitalize()}, the loss at the end of {len(run.losses)} steps is "
            f"{run.final:.3g}, {ratio:.2g} times that of the best of three Adams "
            f"({best.removeprefix('Adam ')}: {runs[best].final:.3g})."
        )
        middle = len(run.losses) // 2
        steps = {t: n[middle]["step_ratio"] for t, n in run.numbers.items()}
        small, large = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        lines.append(
            f"Half way through, a step is {steps[small]:.2g} of the tensor for `{small}` and "
            f"{steps[large]:.2g} for `{large}`."
        )
    return lines


def of_ablation(found: Ablation) -> list[str]:
    """The inputs and units that matter most."""
    named = ", ".join(f"{change.name} ({change.ratio:.2g})" for change in found.inputs[:4])
    idle = sum(1 / 1.02 < change.ratio < 1.02 for change in found.inputs)
    units = sum(1 / 1.02 < change.ratio < 1.02 for change in found.units)
    return [
        f"Held at its mean over the same runs, each of these inputs changes the final loss most "
        f"(ratio): {named}.",
        f"{idle} of {len(found.inputs)} inputs and {units} of {len(found.units)} units change it "
        f"by less than 2 % on these short runs, taken one at a time.",
    ]
