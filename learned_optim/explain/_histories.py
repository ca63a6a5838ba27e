"""What a rule makes of the current gradient, after histories of several kinds."""

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

# Coordinates whose gradient is varied, of the 1,024 of the tensor; the others go on as they did.
_VARIED, _POINTS = 64, 41
_DECAY = 30.0  # steps in which the decaying gradient falls by e


@dataclass(frozen=True)
class History:
    """A sequence of gradients along fixed signs.

    Attributes:
        name: for titles.
        at: step -> amplitude along each coordinate's own sign.
        noise: standard deviation of noise on it.
        widest: the current gradient is varied between plus and minus this, in units of ``unit``.
        unit: size of a gradient that fits the history's end.
    """

    name: str
    at: Callable[[int], float]
    noise: float = 0.0
    widest: float = 3.0
    unit: float = 1.0


HISTORIES = (
    History("constant", lambda _: 1.0),
    History("alternating", lambda step: (-1.0) ** step),
    History("noisy", lambda _: 0.1, noise=math.sqrt(1 - 0.1**2)),
    History("decaying", lambda step: math.exp(-step / _DECAY), unit=math.exp(-SETTLED / _DECAY)),
    History("suddenly large", lambda _: 0.3, noise=math.sqrt(1 - 0.3**2), widest=30.0),
)


@dataclass(frozen=True)
class Curve:
    """Descent as a function of the current gradient.

    Attributes:
        gradient: in units of the history's end, positive along the history's sign, ``(p,)``.
        descent: mean step down the history's sign by rule, in units of the tensor's scale,
            ``(p,)``. Hand-written rules have the learning rate at which their steps are as large
            as the learned rule's on gradients of which three tenths are signal.
        size: root mean square of the steps at the history's end by rule, in the same units.
    """

    gradient: list[float]
    descent: dict[str, list[float]]
    size: dict[str, float]

    def at(self, rule: str, gradient: float) -> float:
        """The descent at the point nearest to a gradient."""
        nearest = min(range(len(self.gradient)), key=lambda i: abs(self.gradient[i] - gradient))
        return self.descent[rule][nearest]


def matched_rates(rule: UpdateRule) -> dict[str, float]:
    """Factors on the references' updates that make their typical steps as large as the rule's."""
    size = settled_step(Probe(rule), typical(1024))
    return {
        name: size / settled_step(Probe(make()), typical(1024)) for name, make in REFERENCES.items()
    }


def curves(rule: UpdateRule) -> dict[str, Curve]:
    """The response of the rule and of the references to the current gradient, by history."""
    rates = {"learned": 1.0, **matched_rates(rule)}
    rules = {"learned": rule, **{name: make() for name, make in REFERENCES.items()}}
    found = {}
    for history in HISTORIES:
        gradient = torch.linspace(-history.widest, history.widest, _POINTS).tolist()
        descent, size = {}, {}
        for name, rate in rates.items():
            values, own = _response(rules[name], history, gradient)
            descent[name] = [rate * value for value in values]
            size[name] = rate * own
        found[history.name] = Curve(gradient, descent, size)
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

    sizes = [rms(probe.advance(grad(step)).update) for step in range(SETTLED)]
    last, descent = grad(SETTLED), []
    for value in gradient:
        present = last.clone()
        present[:_VARIED] = signs[:_VARIED] * value * history.unit
        update = probe.look(present)[0].update
        descent.append(-float((update * signs)[:_VARIED].mean()) / probe.scale)
    return descent, sum(sizes[-AVERAGED:]) / AVERAGED / probe.scale
