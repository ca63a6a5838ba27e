"""Low-rank adapters by how much less their second matrix steps, which starts at zero.

    python -m benchmarks.adapters    # ten minutes on one core; $LEARNED_OPTIM_DATA

Perceptrons of the meta-training mixture that have learned MNIST's meta half go on with 64 to 2,000
of its images, changed, by adapters of their frozen weights; 2,000 more are held out. The default,
by the power of width over height that its second matrices go by (`adapter_power`; 0 is
`general-7`), against AdamW tuned per task on the training loss, under a cosine where the length is
known. Figures are geometric means over tasks, with 95 % intervals by bootstrap over them: of the
final training loss and of the held-out loss at the end over tuned AdamW's, of the latter over that
of AdamW at 1e-3, and of how far the held-out loss ever was above the first, over tuned AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from benchmarks import no_options
from benchmarks.own_decay import (
    MakeStep,
    Step,
    adamw,
    ratio_of,
    rule_with,
    samplers,
    step_of,
)
from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Params, Population, Sampler, copies_of
from learned_optim.meta.populations._mixture import Draw
from learned_optim.meta.populations._rollout import ADAMW_LRS
from learned_optim.meta.populations.classification import Classification
from learned_optim.meta.populations.restarts import Restart
from learned_optim.summary import table

TASKS = 40
POWERS = (0.0, 0.35, 0.5, 0.6, 0.8, 1.0)
MOST_WEIGHTS, LARGEST_BATCH, STEPS = 20_000, 128, (80, 600)
HELD_OUT = 2000
# Steps after which the held-out loss is read, besides every twentieth.
EARLY = (1, 2, 3, 5, 8, 13)


class Adapters(Restart):
    """Restarts of perceptrons, of whose new images some are held out."""

    families = [Classification] * 4
    base: Classification

    def _change_data(self, base: Classification, draw: Sampler) -> None:
        count = draw.log_integer(64, 2000)
        few = draw.subset(count + HELD_OUT, len(base.pixels))
        pixels = draw.uniform(0.5, 1.2) * base.pixels[few] + draw.uniform(-0.3, 0.3)
        pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=draw.generator)
        labels = base.labels[few]
        masks = base.net.masks(HELD_OUT, Generator().manual_seed(0))
        self.held_out = pixels[count:], labels[count:], masks
        base.pixels, base.labels, base.example_weights = pixels[:count], labels[:count], None


def tasks() -> Iterator[tuple[int, Adapters, int]]:
    """Seeds, tasks with adapters, and the lengths of their runs."""
    for seed, sampler in zip(range(10**6), samplers(1), strict=False):
        try:
            task = Adapters(sampler, DataOptions())
        except ValueError:
            continue
        if task.mode != "adapter" or task.base.batch_size > LARGEST_BATCH:
            continue
        if len(task.base.pixels) < 64 or len(task.held_out[0]) < HELD_OUT:
            continue
        if sum(p.numel() for p in task.init(Generator().manual_seed(0)).values()) <= MOST_WEIGHTS:
            yield seed, task, sampler.log_integer(*STEPS)


def learned(params: Params, run: Draw) -> Step:
    """The default, a copy for each power."""
    slices = [list(param.detach().unbind()) for param in params.values()]
    total = run.steps if run.known else None
    optimizers = [
        LearnedOptimizer(list(own), rule_with("default", adapter_power=power), total_steps=total)
        for own, power in zip(zip(*slices, strict=True), POWERS, strict=True)
    ]
    return step_of(slices, optimizers)


def curves(run: Draw, seed: int, make: MakeStep, copies: int) -> tuple[Tensor, Tensor]:
    """Final training losses ``(B,)``, and held-out losses along the way, ``(readings, B)``."""
    task: Population = run.task
    assert isinstance(task, Adapters)
    generator = Generator().manual_seed(seed)
    params = copies_of(task.init(generator), copies)
    step, values = make(params, run), list(params.values())
    with torch.no_grad():
        held_out = [task.losses(params, task.held_out)]
    training = []
    for done in range(1, run.steps + 1):
        losses = task.losses(params, task.batch(generator))
        step(torch.autograd.grad(losses.sum(), values))
        training.append(losses.detach())
        if done in EARLY or done % 20 == 0 or done == run.steps:
            with torch.no_grad():
                held_out.append(task.losses(params, task.held_out))
    last = torch.stack(training[-max(5, run.steps // 20) :]).mean(0)
    return last.nan_to_num(math.inf), torch.stack(held_out).nan_to_num(math.inf)


def logs(run: Draw, seed: int) -> Tensor:
    """Logs of the four figures of every power, ``(4, powers)``."""
    training, held_out = curves(run, seed, learned, len(POWERS))
    theirs, their_held_out = curves(run, seed, adamw, len(ADAMW_LRS))
    best = int(theirs.argmin())
    highest = (held_out / held_out[0]).max(0).values
    their_highest = (their_held_out[:, best] / their_held_out[0, best]).max()
    return torch.stack((
        training / theirs[best],
        held_out[-1] / their_held_out[-1, best],
        held_out[-1] / their_held_out[-1, ADAMW_LRS.index(1e-3)],
        highest / their_highest,
    )).log()  # fmt: skip


def main() -> None:
    """Print the table."""
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for _, (seed, task, steps) in zip(range(TASKS), tasks(), strict=False):
        for known, rows in found.items():
            rows.append(logs(Draw(task, steps, known), seed))
    titles = ["training", "held out", "held out / AdamW at 1e-3", "highest held out"]
    lines = []
    for known, rows in found.items():
        stacked = torch.stack(rows)  # (tasks, 4, powers)
        for index, power in enumerate(POWERS):
            columns = [ratio_of(one.tolist()) for one in stacked[:, :, index].t()]
            lines.append(["known" if known else "unknown", f"{power:g}", *columns])
    print(table(["length", "power", *titles], lines))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
