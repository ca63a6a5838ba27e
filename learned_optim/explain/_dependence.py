"""How the step depends on a tensor's scale and shape, on noise, on progress; and on one event."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from learned_optim.explain._probe import (
    REFERENCES,
    SHAPE,
    Probe,
    rms,
    settled_step,
    typical,
)
from learned_optim.rules import UpdateRule

SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHAPES = (
    (10,),
    (100,),
    (1000,),
    (10, 10),
    (32, 32),
    (100, 100),
    (10, 784),
    (16, 3, 3, 3),
    (300, 4),
)
SIGNALS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
LENGTH = 200

#: When the event of :func:`responses` happens, how large it is, and for how long it is watched.
EVENT, SIZE, WATCHED = 60, 3.0, 60


@dataclass(frozen=True)
class Dependence:
    """Sizes of the settled step, as multiples of the tensor's scale except where said.

    Attributes:
        scale: by the scale as a multiple of what the shape suggests; steps in units of the latter.
        shape: by shape.
        signal: by the amplitude of the part of the gradient that stays the same.
        signal_adam: the same of Adam, at the rate that makes its step at .3 as large.
        known: step by step, in a run whose length the rule is told; empty if it reads none.
        unknown: step by step, without.
        horizon: length of the run.
    """

    scale: dict[float, float]
    shape: dict[str, float]
    signal: dict[float, float]
    signal_adam: dict[float, float]
    known: list[float]
    unknown: list[float]
    horizon: int


def dependence(rule: UpdateRule) -> Dependence:
    """Vary one thing at a time about a tensor of 32 x 32 on typical gradients."""
    n = math.prod(SHAPE)
    natural = Probe(rule).scale
    adam = REFERENCES["Adam"]
    signal = {s: settled_step(Probe(rule), typical(n, s)) for s in SIGNALS}
    by_adam = {s: settled_step(Probe(adam()), typical(n, s)) for s in SIGNALS}
    rate = signal[0.3] / by_adam[0.3]
    return Dependence(
        scale={s: s * settled_step(Probe(rule, scale=s * natural), typical(n)) for s in SCALES},
        shape={
            "x".join(map(str, shape)): settled_step(Probe(rule, shape), typical(math.prod(shape)))
            for shape in SHAPES
        },
        signal=signal,
        signal_adam={s: rate * value for s, value in by_adam.items()},
        known=_course(rule, LENGTH) if rule.reads_horizon else [],
        unknown=_course(rule, None),
        horizon=LENGTH,
    )


def _course(rule: UpdateRule, total_steps: int | None) -> list[float]:
    probe, grads = Probe(rule, total_steps=total_steps), typical(math.prod(SHAPE))
    return [rms(probe.advance(grads()).update) / probe.scale for _ in range(LENGTH)]


@dataclass(frozen=True)
class Response:
    """What one event in the gradients changes, against the same run without it.

    Attributes:
        update: mean change of the step downhill by rule, per step from the event on, in units of
            the rule's usual step. An impulse is one gradient that is larger by 3, a step a
            gradient that stays larger by 1, of gradients of mean square 1.
        network: root mean square change of the network's state over that state's; empty without.
        gains: gains of the directions with the event, per step.
    """

    update: dict[str, list[float]]
    network: list[float]
    gains: list[list[float]]


def responses(rule: UpdateRule) -> dict[str, Response]:
    """Impulse and step response of the rule, and the updates of the references beside it."""
    rules = {"learned": rule, **{name: make() for name, make in REFERENCES.items()}}
    found = {}
    for kind in ("impulse", "step"):
        seen = {name: _respond(own, kind) for name, own in rules.items()}
        found[kind] = Response(
            {name: one[0] for name, one in seen.items()}, seen["learned"][1], seen["learned"][2]
        )
    return found


def _respond(rule: UpdateRule, kind: str) -> tuple[list[float], list[float], list[list[float]]]:
    n = math.prod(SHAPE)
    with_event, without = Probe(rule), Probe(rule)
    grads = typical(n, 0.3)
    usual = [rms(without.advance(g).update) for g in _both(with_event, grads, EVENT)]
    unit = sum(usual[-20:]) / 20
    update, network, gains = [], [], []
    for step in range(WATCHED):
        grad = grads()
        extra = (SIZE if step == 0 else 0.0) if kind == "impulse" else 1.0
        one, other = with_event.advance(grad + extra), without.advance(grad)
        update.append(-float((one.update - other.update).mean()) / unit)
        gains.append(one.gains.tolist())
        if len(one.network):
            network.append(rms(one.network - other.network) / max(rms(other.network), 1e-12))
    return update, network, gains


def _both(probe: Probe, grads: Callable[[], Tensor], steps: int) -> list[Tensor]:
    """Advance a probe and return the gradients it was given."""
    given = [grads() for _ in range(steps)]
    for grad in given:
        probe.advance(grad)
    return given
