"""The step as a function of a tensor's scale and shape, of noise and of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learned_optim.explain._probe import REFERENCES, SHAPE, Probe, rms, settled_step, typical
from learned_optim.rules import UpdateRule

SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHAPES = (
    (10,), (100,), (1000,), (10, 10), (32, 32), (100, 100), (10, 784), (16, 3, 3, 3), (300, 4),
)  # fmt: skip
SIGNALS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
LENGTH = 200


@dataclass(frozen=True)
class Dependence:
    """Root mean square steps after a typical history, in units of the tensor's scale.

    Attributes:
        scale: by scale. Scales and steps are in units of the shape's usual scale.
        shape: by shape.
        signal: by the amplitude of the gradient's constant part.
        signal_adam: the same of Adam; its learning rate gives an equal step at amplitude 0.3.
        known: every step of a run with ``total_steps``; empty if the rule does not read it.
        unknown: every step of a run without ``total_steps``.
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
    """Vary one variable at a time, from a tensor of 32 x 32 and typical gradients."""
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
    return [rms(probe.advance(grads())) / probe.scale for _ in range(LENGTH)]
