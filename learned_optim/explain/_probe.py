"""One tensor under an update rule, with gradients made up for the purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learned_optim._shapes import init_scale
from learned_optim.rules import Segments, State, StepContext, UpdateRule
from learned_optim.rules.classical import (
    AdamConfig,
    AdamRule,
    RMSpropConfig,
    RMSpropRule,
    SGDConfig,
    SGDRule,
)

#: Steps after which a history counts as settled, and those over which a step is averaged.
SETTLED, AVERAGED = 100, 20
#: Shape of the probed tensor unless the question is another shape.
SHAPE = (32, 32)

#: The hand-written rules that a learned one is held against. Their learning rates do not matter.
REFERENCES: dict[str, Callable[[], UpdateRule]] = {
    "Adam": lambda: AdamRule(AdamConfig(lr=1.0)),
    "RMSprop": lambda: RMSpropRule(RMSpropConfig(lr=1.0)),
    "momentum": lambda: SGDRule(SGDConfig(lr=1.0, momentum=0.9)),
}


@dataclass(frozen=True)
class Seen:
    """One step of a probe.

    Attributes:
        update: ``(n,)``.
        gains: mean gain of each direction, positive downhill, ``(d,)``; empty without a network.
        network: state that the network owns after the step, flattened.
    """

    update: Tensor
    gains: Tensor
    network: Tensor


class Probe:
    """A tensor that stays where it is, so that nothing varies but what the rule remembers.

    Args:
        rule: the update rule; runs in its pure form, a loss of 1 is shown to rules that read one.
        shape: of the tensor.
        scale: standard deviation of its entries; that of its shape if not given.
        total_steps: length of the run, for rules that read it.
        seed: of the entries.

    Attributes:
        scale: as given.
        step: number of steps taken.
    """

    def __init__(
        self,
        rule: UpdateRule,
        shape: tuple[int, ...] = SHAPE,
        scale: float | None = None,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rule, self.total_steps, self.step = rule, total_steps, 0
        self.scale = init_scale(torch.Size(shape)) if scale is None else scale
        draws = torch.randn(math.prod(shape), generator=Generator().manual_seed(seed))
        self.param = self.scale * draws / draws.square().mean().sqrt()
        self._segments = Segments([torch.Size(shape)])
        packed = self.param.view(shape)
        self._state: State = {
            key: value.reshape(-1, value.shape[-1])
            for key, value in rule.init_state(packed).items()
        }

    @torch.no_grad()
    def look(self, grad: Tensor) -> tuple[Seen, State]:
        """What the rule would do with a gradient ``(n,)``, and its state then."""
        rule, segments = self.rule, self._segments
        told = self.total_steps if rule.reads_horizon else None
        loss = torch.ones(()) if rule.needs_loss else None
        context = StepContext(torch.full((1,), float(self.step)), loss, told)
        if type(rule).forward is not UpdateRule.forward or rule.rows == "none":
            update, new = rule(grad, self._state, self.param, segments, context)
            return Seen(update, torch.zeros(0), torch.zeros(0)), {**self._state, **new}
        features, directions, moments = rule.observe(
            grad, self._state, self.param, segments, context
        )
        assert features is not None
        own = {key: self._state[key] for key in rule.network_state}
        gains, network = rule.respond(features.unsqueeze(0), own)
        update = rule.mix(directions, gains[0], segments)
        flat = torch.cat([value.reshape(-1) for value in network.values()])
        return Seen(update, -gains[0].mean(0), flat), {**self._state, **moments, **network}

    def advance(self, grad: Tensor) -> Seen:
        """One step."""
        seen, self._state = self.look(grad)
        self.step += 1
        return seen


def rms(value: Tensor) -> float:
    """Root mean square."""
    return float(value.square().mean().sqrt())


def typical(n: int, signal: float = 0.3, seed: int = 1) -> Callable[[], Tensor]:
    """Gradients ``(n,)`` of mean square 1 of which ``signal``, an amplitude, stays the same."""
    generator = Generator().manual_seed(seed)
    fixed = torch.randn(n, generator=generator).sign() * signal
    noise = math.sqrt(max(0.0, 1.0 - signal**2))
    return lambda: fixed + noise * torch.randn(n, generator=generator)


def settled_step(probe: Probe, grads: Callable[[], Tensor], steps: int = SETTLED) -> float:
    """Size of the steps at the end of a history, as a multiple of the tensor's scale."""
    sizes = [rms(probe.advance(grads()).update) for _ in range(steps)][-AVERAGED:]
    return sum(sizes) / len(sizes) / probe.scale
