"""The step as a function of the current gradient, after histories of several kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.explain._probe import (
    AVERAGED,
    REFERENCES,
    SETTLED,
    Probe,
    rms,
    settled_step,
    typical,
)
from learned_optim.rules import UpdateRule

_VARIED = 64  # coordinates, of 1,024, whose current gradient is varied
_POINTS = 41  # values of it
_DECAY = 30.0  # steps in which the decaying gradient falls by e


@dataclass(frozen=True)
class History:
    """A sequence of gradients along fixed signs."""

    name: str
    at: Callable[[int], float]  # step -> amplitude along each coordinate's own sign
    noise: float = 0.0  # standard deviation
    widest: float = 3.0  # the current gradient varies from minus to plus this, in units of `unit`
    unit: float = 1.0  # size of a gradient at the end of the history


HISTORIES = (
    History("constant", lambda _: 1.0),
    History("alternating", lambda step: (-1.0) ** step),
    History("noisy", lambda _: 0.1, noise=math.sqrt(1 - 0.1**2)),
    History("decaying", lambda step: math.exp(-step / _DECAY), unit=math.exp(-SETTLED / _DECAY)),
    History("suddenly large", lambda _: 0.3, noise=math.sqrt(1 - 0.3**2), widest=30.0),
)


@dataclass(frozen=True)
class Curve:
    """The step as a function of the current gradient, by rule, in units of the tensor's scale.

    Attributes:
        gradient: in units of the gradients at the history's end, positive along their sign.
        descent: mean step against the history's sign. Hand-written rules have the learning rates
            that make their typical steps as large as the learned rule's.
        size: root mean square step at the history's end.
    """

    gradient: list[float]
    descent: dict[str, list[float]]
    size: dict[str, float]


def curves(rule: UpdateRule) -> dict[str, Curve]:
    """Curves of the rule and of the references, by history."""
    rules = {"learned": rule, **{name: make() for name, make in REFERENCES.items()}}
    sizes = {name: settled_step(Probe(own), typical(1024)) for name, own in rules.items()}
    rates = {name: sizes["learned"] / size for name, size in sizes.items()}
    found = {}
    for history in HISTORIES:
        gradient = torch.linspace(-history.widest, history.widest, _POINTS).tolist()
        curve = found[history.name] = Curve(gradient, {}, {})
        for name, rate in rates.items():
            descent, size = _response(rules[name], history, gradient)
            curve.descent[name] = [rate * value for value in descent]
            curve.size[name] = rate * size
    return found


def _response(
    rule: UpdateRule, history: History, gradient: list[float]
) -> tuple[list[float], float]:
    """Descent by current gradient after a history, and the size of the step at its end."""
    probe = Probe(rule)
    n = len(probe.param)
    generator = torch.Generator().manual_seed(2)
    signs = torch.randn(n, generator=generator).sign()

    def grad(step: int) -> Tensor:
        return signs * (history.at(step) + history.noise * torch.randn(n, generator=generator))

    sizes = [rms(probe.advance(grad(step))) for step in range(SETTLED)]
    last, varied = grad(SETTLED), []
    for value in gradient:
        varied.append(last.clone())
        varied[-1][:_VARIED] = signs[:_VARIED] * value * history.unit
    updates = probe.alternatives(varied)
    descent = [-float((u * signs)[:_VARIED].mean()) / probe.scale for u in updates]
    return descent, sum(sizes[-AVERAGED:]) / AVERAGED / probe.scale
