"""Steps of an update rule: on a tensor with synthetic gradients, and in short trainings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim._tensors import init_scale
from learned_optim.meta.tasks import ModuleTask, Task, TaskOptions, build_tasks
from learned_optim.rules import UpdateRule, classical

#: Steps of a history, and steps at its end over which the size of a step is averaged.
SETTLED, AVERAGED = 100, 20
#: Shape of the probed tensor unless the shape varies.
SHAPE = (32, 32)

#: Hand-written rules beside the learned one. Their learning rates are matched to its steps.
REFERENCES: dict[str, Callable[[], UpdateRule]] = {
    "Adam": lambda: classical.AdamRule(classical.AdamConfig(lr=1.0)),
    "RMSprop": lambda: classical.RMSpropRule(classical.RMSpropConfig(lr=1.0)),
    "momentum": lambda: classical.SGDRule(classical.SGDConfig(lr=1.0, momentum=0.9)),
}


class Probe:
    """A tensor that is put back after every step; rules that read the loss are shown a loss of 1.

    ``scale`` is the root mean square of its entries; ``None`` for the usual one of the shape.
    """

    def __init__(
        self,
        rule: UpdateRule,
        shape: tuple[int, ...] = SHAPE,
        scale: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.scale = init_scale(shape) if scale is None else scale
        draws = torch.randn(math.prod(shape), generator=Generator().manual_seed(0))
        self.param = self.scale * draws / draws.square().mean().sqrt()
        self._tensor = nn.Parameter(self.param.view(shape).clone())
        self._optimizer = LearnedOptimizer(
            [self._tensor], rule, total_steps=total_steps if rule.reads_horizon else None,
            warmup=0, weight_decay=0.0,
        )  # fmt: skip

    @torch.no_grad()
    def advance(self, grad: Tensor) -> Tensor:
        """The update ``(n,)`` of one step with a gradient ``(n,)``."""
        self._tensor.grad = grad.view_as(self._tensor).clone()
        self._optimizer.step(lambda: 1.0)
        update = self._tensor.flatten() - self.param
        self._tensor.copy_(self.param.view_as(self._tensor))
        return update

    def alternatives(self, grads: list[Tensor]) -> list[Tensor]:
        """The updates that each of several gradients would give next."""
        state = copy.deepcopy(self._optimizer.state_dict())
        updates = []
        for grad in grads:
            updates.append(self.advance(grad))
            self._optimizer.load_state_dict(copy.deepcopy(state))
        return updates

    def steps(self, grad: Callable[[int], Tensor], count: int) -> list[float]:
        """Root mean square steps, in units of the tensor's scale."""
        updates = (self.advance(grad(step)) for step in range(count))
        return [float(update.square().mean().sqrt()) / self.scale for update in updates]

    def settled_step(self, grad: Callable[[int], Tensor]) -> float:
        """The mean of the last of :data:`SETTLED` steps of a history."""
        return sum(self.steps(grad, SETTLED)[-AVERAGED:]) / AVERAGED

    def typical(self, signal: float = 0.3) -> Callable[[int], Tensor]:
        """Gradients ``(n,)`` of mean square 1 with a constant part of amplitude ``signal``."""
        n, generator = len(self.param), Generator().manual_seed(1)
        fixed = torch.randn(n, generator=generator).sign() * signal
        noise = math.sqrt(max(0.0, 1.0 - signal**2))
        return lambda _: fixed + noise * torch.randn(n, generator=generator)

    def typical_step(self, signal: float = 0.3) -> float:
        """The settled step on typical gradients."""
        return self.settled_step(self.typical(signal))


# ---- the step as a function of the current gradient

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
    """The step against the current gradient, in units of the tensor's scale.

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
    sizes = {name: Probe(own).typical_step() for name, own in rules.items()}
    found = {}
    for history in HISTORIES:
        gradient = torch.linspace(-history.widest, history.widest, _POINTS).tolist()
        curve = found[history.name] = Curve(gradient, {}, {})
        for name, own in rules.items():
            rate = sizes["learned"] / sizes[name]
            descent, size = _response(own, history, gradient)
            curve.descent[name] = [rate * value for value in descent]
            curve.size[name] = rate * size
    return found


def _response(
    rule: UpdateRule, history: History, gradient: list[float]
) -> tuple[list[float], float]:
    """Descent by current gradient after a history; the step at its end."""
    probe, generator = Probe(rule), Generator().manual_seed(2)
    n = len(probe.param)
    signs = torch.randn(n, generator=generator).sign()

    def grad(step: int) -> Tensor:
        return signs * (history.at(step) + history.noise * torch.randn(n, generator=generator))

    size = probe.settled_step(grad)
    last, varied = grad(SETTLED), []
    for value in gradient:
        varied.append(last.clone())
        varied[-1][:_VARIED] = signs[:_VARIED] * value * history.unit
    updates = probe.alternatives(varied)
    return [-float((u * signs)[:_VARIED].mean()) / probe.scale for u in updates], size


# ---- the step as a function of scale, shape, noise and progress

SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHAPES = (
    (10,), (100,), (1000,), (10, 10), (32, 32), (100, 100), (10, 784), (16, 3, 3, 3), (300, 4),
)  # fmt: skip
SIGNALS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
LENGTH = 200


@dataclass(frozen=True)
class Dependence:
    """Root mean square steps on typical gradients, in units of the scale.

    Attributes:
        scale: by scale. Scales and steps are in units of the shape's usual scale.
        shape: by shape.
        signal: by the amplitude of the gradient's constant part.
        signal_adam: the same of Adam; its learning rate gives an equal step at amplitude 0.3.
        known: every step of a run with ``total_steps``; empty if the rule does not read it.
        unknown: every step of a run without ``total_steps``.
    """

    scale: dict[float, float]
    shape: dict[str, float]
    signal: dict[float, float]
    signal_adam: dict[float, float]
    known: list[float]
    unknown: list[float]


def dependence(rule: UpdateRule) -> Dependence:
    """Vary one variable at a time, on typical gradients."""
    signal = {s: Probe(rule).typical_step(s) for s in SIGNALS}
    adam = {s: Probe(REFERENCES["Adam"]()).typical_step(s) for s in SIGNALS}
    usual, known, unknown = Probe(rule).scale, Probe(rule, total_steps=LENGTH), Probe(rule)
    return Dependence(
        scale={s: s * Probe(rule, scale=s * usual).typical_step() for s in SCALES},
        shape={"x".join(map(str, shape)): Probe(rule, shape).typical_step() for shape in SHAPES},
        signal=signal,
        signal_adam={s: signal[0.3] / adam[0.3] * step for s, step in adam.items()},
        known=known.steps(known.typical(), LENGTH) if rule.reads_horizon else [],
        unknown=unknown.steps(unknown.typical(), LENGTH),
    )


# ---- short trainings on bundled data, watched step by step

WATCHED_STEPS = 300
ADAM_LRS = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Watched:
    """A run: losses before every step; diagnostics of every step by tensor."""

    losses: list[float]
    numbers: dict[str, list[dict[str, float]]]

    @property
    def final(self) -> float:
        """Mean loss of the last tenth."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def digits_classifier() -> Task:
    """A 64-32-32-10 ReLU network on scikit-learn's digits, batches of 64."""
    digits = build_tasks("digits-torch", TaskOptions()).sample(Generator().manual_seed(0))

    def build() -> nn.Module:
        layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    def batches(generator: Generator) -> tuple[Tensor, ...]:
        images, labels = digits.batch(generator)
        return images[:64], labels[:64]

    return ModuleTask(build, batches)


def watch(task: Task, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Watched:
    """Train a task, recording losses and the diagnostics of a learned optimizer."""
    generator = Generator().manual_seed(0)
    params = {name: p.requires_grad_() for name, p in task.init(generator).items()}
    optimizer = make(list(params.values()))
    if isinstance(optimizer, LearnedOptimizer):
        optimizer.diagnose()
    run = Watched([], {name: [] for name in params})
    for _ in range(WATCHED_STEPS):
        loss = task.loss(params, task.batch(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda loss=loss: loss.detach())  # type: ignore[misc]
        run.losses.append(float(loss.detach()))
        found = optimizer.diagnostics() if isinstance(optimizer, LearnedOptimizer) else {}
        for index, name in enumerate(params):
            if f"0/{index}" in found:
                run.numbers[name].append(found[f"0/{index}"])
    return run


def watch_digits(rule: UpdateRule) -> dict[str, Watched]:
    """The digits classifier by the rule, with and without ``total_steps``, and by Adam."""
    makers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {}
    if rule.reads_horizon:
        makers["with total_steps"] = partial(LearnedOptimizer, rule=rule, total_steps=WATCHED_STEPS)
    makers["without total_steps"] = partial(LearnedOptimizer, rule=rule)
    makers |= {f"Adam {lr:g}": partial(torch.optim.Adam, lr=lr) for lr in ADAM_LRS}
    task = digits_classifier()
    return {label: watch(task, make) for label, make in makers.items()}
