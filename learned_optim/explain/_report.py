"""The report on a checkpoint: Markdown and plots in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from learned_optim import load_rule
from learned_optim.checkpoint import write_text
from learned_optim.explain import _figures, _words
from learned_optim.explain._ablation import ablate
from learned_optim.explain._dependence import Dependence, dependence, responses
from learned_optim.explain._histories import Curve, curves
from learned_optim.explain._network import has_network
from learned_optim.explain._runs import QUICK_STEPS, WATCHED_STEPS, watch_digits
from learned_optim.rules import UpdateRule

REPORT = "README.md"


def explain(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    short: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a report on what a checkpoint's update rule does.

    Args:
        checkpoint: as for :func:`learned_optim.load_rule`.
        output: folder of the report, made where missing; files of an earlier report are replaced.
        short: leave out impulse responses and ablation.
        progress: is told what is being done.

    Returns:
        The report, ``README.md`` in the folder.

    Raises:
        ValueError: there is no such checkpoint, or it is not one.
        OSError: a file cannot be read or written.
        ImportError: no matplotlib, which the ``meta`` extra brings.

    Example:
        >>> explain("default", "runs/explain", short=True)  # doctest: +SKIP
    """
    rule = load_rule(checkpoint)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def said(section: str) -> str:
        title = section.partition("\n")[0].lstrip("# ")
        progress(f"[{time.perf_counter() - started:4.0f} s] {title}")
        return section

    after, about = curves(rule), dependence(rule)
    short_words = f"## In short\n\n{_bullets(_words.in_short(after, about))}"
    sections = [
        _head(rule, os.fspath(checkpoint), short),
        said(short_words),
        said(_histories(after, folder)),
        said(_run(rule, folder)),
        said(_dependence(about, folder)),
    ]
    if not short:
        sections.append(said(_responses(rule, folder)))
        if has_network(rule):
            sections.append(said(_ablation(rule, folder)))
    report = folder / REPORT
    write_text(report, "\n\n".join(sections) + "\n")
    return report


def _head(rule: UpdateRule, name: str, short: bool) -> str:
    count = sum(p.numel() for p in rule.parameters())
    option = " --short" if short else ""
    return (
        f"# What `{name}` has learned\n\n"
        f"An update rule of type `{rule.name}` with {count:,} weights, fingerprint "
        f"`{rule.fingerprint()}`. Everything here, words included, was computed by\n\n"
        f"```sh\nlearned-optim explain {name}{option}\n```\n\n"
        "from gradients made up for the purpose and short runs on bundled data, seeded. Runs are "
        "single ones where nothing else is said: they show what the rule does, not how well. How "
        "well is what `learned-optim evaluate` is for."
    )


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _histories(found: dict[str, Curve], folder: Path) -> str:
    _figures.plot_histories(found, folder / "histories.png")
    names = list(next(iter(found.values())).size)
    rows = [
        f"| {'typical' if name == 'suddenly large' else name} | "
        + " | ".join(f"{curve.size[rule]:.2g}" for rule in names)
        + " |"
        for name, curve in found.items()
    ]
    table = "\n".join(
        [f"| root mean square step / scale | {' | '.join(names)} |", "|---" * 5 + "|", *rows]
    )
    return (
        "## The update as a function of the current gradient\n\n"
        "A tensor of 32 x 32 has seen a hundred gradients of one kind. What does it do with the "
        "next, if that has this value? The hand-written rules have the learning rate at which "
        "their steps are as large as the learned ones on gradients of mean square 1 of which .3 "
        "stays the same. The tensor itself does not move.\n\n"
        f"![Step against current gradient](histories.png)\n\n{_bullets(_words.of_histories(found))}"
        f"\n\n{table}"
    )


def _run(rule: UpdateRule, folder: Path) -> str:
    runs = watch_digits(rule)
    _figures.plot_run(runs, folder / "run.png")
    text = (
        f"## A real run\n\nA 64-32-32-10 ReLU network on scikit-learn's digits, batches of 64, "
        f"{WATCHED_STEPS} steps, one seed. The effective learning rate is that with which gradient "
        f"descent would have gone as far along the gradient.\n\n![Loss, relative step and "
        f"effective learning rate](run.png)\n\n{_bullets(_words.of_run(runs))}"
    )
    run = next(iter(runs.values()))
    numbers = next(iter(run.numbers.values()))
    if any(key.startswith("gain/") for key in numbers[0]):
        directions = len(_figures.gain_shares(numbers[0]))
        if directions > 1:
            _figures.plot_gains(run, folder / "gains.png")
            text += (
                "\n\nWhat each direction adds to the step, over the same run; negative shares go "
                "against the direction.\n\n![Gains over time](gains.png)"
            )
    return text


def _dependence(found: Dependence, folder: Path) -> str:
    _figures.plot_dependence(found, folder / "dependence.png")
    return (
        "## Scale, shape, noise, progress\n\nSizes of the step after a hundred typical gradients, "
        "one thing varied at a time.\n\n![Dependence](dependence.png)\n\n"
        + _bullets(_words.of_dependence(found))
    )


def _responses(rule: UpdateRule, folder: Path) -> str:
    found = responses(rule)
    _figures.plot_responses(found, folder / "responses.png")
    return (
        "## After one event\n\nThe same noisy gradients with and without an event after sixty "
        "steps: an impulse, one gradient larger by 3, or a step, gradients larger by 1 from then "
        "on.\n\n![Impulse and step response](responses.png)\n\n"
        + _bullets(_words.of_responses(found))
    )


def _ablation(rule: UpdateRule, folder: Path) -> str:
    found = ablate(rule)
    _figures.plot_ablation(found, folder / "ablation.png")
    return (
        f"## Without one input or unit\n\nFinal losses of {QUICK_STEPS}-step runs (digits, a "
        "regression, quadratics; two seeds each), the same batches, with one input or one unit of "
        "the network held at its mean over these runs. Bars are geometric means, lines the range "
        f"of the runs.\n\n![Ablation](ablation.png)\n\n{_bullets(_words.of_ablation(found))}"
    )
