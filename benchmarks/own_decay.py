"""Weight decay as a default: what it costs in training, and brings on examples held out.

    python -m benchmarks.own_decay    # fifteen minutes on one core; $LEARNED_OPTIM_DATA

Tasks of the meta-training mixture: a few thousand rows of a random teacher or of MNIST's meta half,
of which some are held out; and, because they are to be fitted exactly, boundary value problems and
coordinate networks. `general-6` is told the length of the run, and weight decay follows its trust
and a power of its schedule. In runs of more than 1,000 steps it is less in inverse proportion, so
that weights left alone shrink alike. AdamW is tuned per task on the training loss. Figures are
geometric means over tasks, with 95 % intervals by bootstrap over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from benchmarks import no_options
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Params, Population, Sampler, copies_of
from learned_optim.meta.populations._mixture import Draw
from learned_optim.meta.populations._rollout import ADAMW_LRS, _adamw, _roll
from learned_optim.meta.populations.boundary import BoundaryValue
from learned_optim.meta.populations.classification import Classification
from learned_optim.meta.populations.coordinates import Coordinates
from learned_optim.meta.populations.tabular import Teacher
from learned_optim.meta.statistics import geometric_mean
from learned_optim.rules import UpdateRule, rule_for
from learned_optim.summary import table

FINITE, EXACT = 20, 10
MOST_WEIGHTS, LARGEST_BATCH, STEPS = 10_000, 64, (600, 2000)


class Decay(NamedTuple):
    """A weight decay, the power of the schedule that it follows, and what it spares.

    Attributes:
        live: it spares coordinates whose gradient is zero.
        matrices_alone: it spares vectors.
    """

    amount: float
    power: float = 1.0
    live: bool = False
    matrices_alone: bool = False


DECAYS = (
    Decay(0.0), Decay(0.5), Decay(1.0), Decay(1.0, matrices_alone=True), Decay(2.0, 2.0),
    Decay(4.0, 3.0), Decay(4.0, 3.0, live=True), Decay(8.0, 4.0, live=True),
)  # fmt: skip
Batch = tuple[Tensor, Tensor]
Step = Callable[[Sequence[Tensor]], None]
MakeStep = Callable[[Params, Draw], Step]


def finite(seed: int) -> tuple[Population, Batch, int]:
    """A task on some of its examples, those held out, and the length of the run."""
    for sampler in samplers(seed):
        try:
            task: Teacher | Classification
            if seed % 2:
                task = Teacher(sampler, DataOptions())
                if task.drift or task.huber:
                    continue
                count = len(task.examples) * 3 // 5
                held = task.examples[count:], task.targets[count:]
                task.examples, task.targets = task.examples[:count], task.targets[:count]
            else:
                task = Classification(sampler, DataOptions())
                if task.example_weights is not None or len(task.pixels) < 10_000:
                    continue
                count = sampler.log_integer(200, 5000)
                order = sampler.subset(count + 2000, len(task.pixels))
                held = task.pixels[order[count:]], task.labels[order[count:]]
                task.pixels, task.labels = task.pixels[order[:count]], task.labels[order[:count]]
        except ValueError:
            continue
        if _is_small(task):
            return task, held, sampler.log_integer(*STEPS)
    raise AssertionError


def exact(seed: int) -> tuple[Population, None, int]:
    """A task without noise."""
    family = BoundaryValue if seed % 2 else Coordinates
    for sampler in samplers(seed):
        try:
            task = family(sampler, DataOptions())
        except ValueError:
            continue
        if _is_small(task):
            return task, None, sampler.log_integer(*STEPS)
    raise AssertionError


def samplers(seed: int) -> Iterator[Sampler]:
    """Of the draws to try until one suits."""
    for attempt in range(1000):
        yield Sampler(Generator().manual_seed(1000 * seed + attempt))


def _is_small(task: Population) -> bool:
    weights = sum(value.numel() for value in task.init(Generator().manual_seed(0)).values())
    return weights < MOST_WEIGHTS and task.batch_size <= LARGEST_BATCH


class Trained:
    """Copies of a task's parameters, trained in ways of their own on the same batches.

    Args:
        task: the population.
        steps: length of the run.
        seed: of parameters and batches.
        optimizer: takes the copies by name, each ``(B, *shape)``; returns what makes a step of
            their gradients.
        copies: how many, ``B``.
    """

    def __init__(
        self, task: Population, steps: int, seed: int, optimizer: MakeStep, copies: int
    ) -> None:
        self.task = task

        def start(initial: Params) -> tuple[Params, Step]:
            self.params = copies_of(initial, copies)
            return self.params, optimizer(self.params, run)

        run = Draw(task, steps, known=True)
        losses = torch.from_numpy(_roll(start, run, seed))
        #: Losses over the last twentieth, ``(B,)``.
        self.training = losses[-max(5, steps // 20) :].mean(0)

    @torch.no_grad()
    def held_out(self, held: Batch) -> Tensor:
        """Losses on examples held out, ``(B,)``."""
        net = self.task.net  # type: ignore[attr-defined]
        masks = net.masks(len(held[0]), Generator().manual_seed(0))
        return self.task.losses(self.params, (*held, masks))


def adamw(params: Params, run: Draw) -> Step:
    """AdamW of the mixture's references, a copy for each learning rate."""
    return _adamw(list(params.values()), torch.tensor(ADAMW_LRS), run)


def learned(params: Params, run: Draw) -> Step:
    """`general-6`, a copy for each weight decay."""
    slices = [list(param.detach().unbind()) for param in params.values()]
    shorter = min(1.0, 1000 / run.steps)
    optimizers = []
    for own, decay in zip(zip(*slices, strict=True), DECAYS, strict=True):
        of_vectors = 0.0 if decay.matrices_alone else decay.amount
        groups = [
            {
                "params": [p for p in own if (p.dim() > 1) is matrices],
                "weight_decay": shorter * (decay.amount if matrices else of_vectors),
            }
            for matrices in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        rule = rule_with("general-6", decay_power=decay.power, decay_live=decay.live)
        optimizers.append(LearnedOptimizer(groups, rule, total_steps=run.steps))
    return step_of(slices, optimizers)


def step_of(slices: Sequence[Sequence[Tensor]], optimizers: Sequence[Optimizer]) -> Step:
    """A step of optimizers of one copy each; ``slices`` are the copies of every parameter."""

    def step(grads: Sequence[Tensor]) -> None:
        for own, grad in zip(slices, grads, strict=True):
            for param, part in zip(own, grad.unbind(), strict=True):
                param.grad = part
        for optimizer in optimizers:
            optimizer.step()

    return step


def rule_with(checkpoint: str, **config: Any) -> UpdateRule:
    """The weights of a checkpoint under another configuration."""
    rule = load_rule(checkpoint)
    found = rule_for(replace(rule.config, **config))
    found.load_state_dict(rule.state_dict())
    return found


def logs(seed: int, is_finite: bool) -> tuple[list[float], list[float]]:
    """Of every decay, the log of training and held-out loss over AdamW's, or that without decay."""
    task, held, steps = finite(seed) if is_finite else exact(seed)
    ours = Trained(task, steps, seed, learned, len(DECAYS))
    if held is None:
        return (ours.training / ours.training[0]).log().tolist(), []
    theirs = Trained(task, steps, seed, adamw, len(ADAMW_LRS))
    rival = theirs.training.nan_to_num(math.inf)
    best = int(rival.argmin())
    held_out = ours.held_out(held) / theirs.held_out(held)[best]
    return (ours.training / rival[best]).log().tolist(), held_out.log().tolist()


def main() -> None:
    """Print the table."""
    on_finite = [logs(seed, True) for seed in range(FINITE)]
    on_exact = [logs(seed, False) for seed in range(EXACT)]
    rows = []
    for index, decay in enumerate(DECAYS):
        columns = [
            [training[index] for training, _ in on_finite],
            [held_out[index] for _, held_out in on_finite],
            [training[index] for training, _ in on_exact],
        ]
        of = " of matrices" if decay.matrices_alone else " where live" if decay.live else ""
        rows.append([f"{decay.amount:g}{of}", f"{decay.power:g}", *map(ratio_of, columns)])
    titles = ["training / tuned AdamW", "held out / tuned AdamW", "exact / no decay"]
    print(table(["weight decay", "power", *titles], rows))


def ratio_of(logarithms: Sequence[float]) -> str:
    """Geometric mean and 95 % interval of ratios, from their logs."""
    found = geometric_mean([math.exp(value) for value in logarithms])
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
