"""Adversarial pairs on random mixtures of Gaussians: how to use the default there, and whether.

    python -m benchmarks.adversarial    # fifteen minutes on one core

A generator and a discriminator of points in the plane take their steps together, under the
non-saturating or the hinge loss, with a penalty of the discriminator's slopes or without; widths,
depths, activations, batches and lengths are drawn. The figure is the sliced Wasserstein distance
between generated and real points, averaged over the last tenth of a run, over that of the best of
AdamW at five learning rates, under a warm-up and a cosine, on the same batches. The last rows are
the geometric mean and the largest. None is the field's pair, whose eight Gaussians are a ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from benchmarks import no_options
from learned_optim import LearnedOptimizer
from learned_optim.meta.populations._base import Sampler
from learned_optim.meta.statistics import geometric_mean
from learned_optim.meta.tasks.adversarial import sliced_distance
from learned_optim.summary import table

GAMES = 10
ADAMW_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
#: Checkpoint, learning rate and weight decay by name.
KINDS: dict[str, tuple[str, float, float | None]] = {
    "default": ("default", 1.0, None),
    "lr=0.5": ("default", 0.5, None),
    "lr=0.25": ("default", 0.25, None),
    "lr=0.1": ("default", 0.1, None),
    "lr=0.03": ("default", 0.03, None),
    "no decay": ("default", 1.0, 0.0),
}
After = Callable[[], object]
Make = Callable[[list[nn.Parameter], int], tuple[Optimizer, After]]


@dataclass(frozen=True)
class Game:
    """What is drawn of a pair and its data."""

    seed: int
    centres: Tensor
    spread: float
    widths: tuple[int, int]
    depth: int
    activation: type[nn.Module]
    noise: int
    batch: int
    penalty: float
    hinge: bool
    steps: int

    @classmethod
    def draw(cls, seed: int) -> Game:
        """The game of a seed."""
        sampler = Sampler(Generator().manual_seed(seed))
        return cls(
            seed=seed,
            centres=0.8 * torch.randn(sampler.choice([3, 5, 10]), 2, generator=sampler.generator),
            spread=sampler.log_uniform(0.03, 0.3),
            widths=(sampler.choice([24, 48, 96]), sampler.choice([24, 48, 96])),
            depth=sampler.choice([1, 2], [1, 2]),
            activation=sampler.choice([nn.Tanh, nn.LeakyReLU, nn.SiLU]),
            noise=sampler.choice([2, 4, 16]),
            batch=sampler.choice([32, 64, 200]),
            penalty=sampler.choice([0.0, 0.3, 1.0, 3.0]),
            hinge=sampler.chance(1 / 3),
            steps=sampler.choice([800, 1500, 3000]),
        )

    def points(self, generator: Generator) -> Tensor:
        """A batch of real ones, ``(batch, 2)``."""
        which = torch.randint(len(self.centres), (self.batch,), generator=generator)
        noise = torch.randn(self.batch, 2, generator=generator)
        return self.centres[which] + self.spread * noise


def perceptron(inputs: int, width: int, outputs: int, game: Game) -> nn.Sequential:
    """A player."""
    layers: list[nn.Module] = [nn.Linear(inputs, width), game.activation()]
    for _ in range(game.depth - 1):
        layers += [nn.Linear(width, width), game.activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def distance(game: Game, make: Make) -> float:
    """Mean distance of generated points from real ones over the last tenth of a run."""
    torch.manual_seed(game.seed)
    generator_net = perceptron(game.noise, game.widths[0], 2, game)
    discriminator = perceptron(2, game.widths[1], 1, game)
    optimizer, after = make([*generator_net.parameters(), *discriminator.parameters()], game.steps)
    generator, distances = Generator().manual_seed(game.seed + 100), []
    for step in range(game.steps):
        real = game.points(generator).requires_grad_()
        fake = generator_net(torch.randn(game.batch, game.noise, generator=generator))
        if step >= 0.9 * game.steps:
            distances.append(sliced_distance(fake.detach(), real.detach()).item())
        at_real, at_fake = discriminator(real), discriminator(fake.detach())
        if game.hinge:
            loss = F.relu(1 - at_real).mean() + F.relu(1 + at_fake).mean()
        else:
            loss = F.softplus(-at_real).mean() + F.softplus(at_fake).mean()
        if game.penalty:
            (slopes,) = torch.autograd.grad(at_real.sum(), real, create_graph=True)
            loss = loss + 0.5 * game.penalty * slopes.square().sum(1).mean()
        discriminator.requires_grad_(False)
        fooled = discriminator(fake)
        loss = loss + (-fooled if game.hinge else F.softplus(-fooled)).mean()
        discriminator.requires_grad_(True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
    mean = sum(distances) / len(distances)
    return mean if math.isfinite(mean) else math.inf


def adamw(lr: float) -> Make:
    """AdamW under a warm-up and a cosine."""

    def make(params: list[nn.Parameter], steps: int) -> tuple[Optimizer, After]:
        def rate(step: int) -> float:
            fall = 0.5 * (1 + math.cos(math.pi * step / steps))
            return min(1.0, (step + 1) / (0.05 * steps)) * fall

        optimizer = torch.optim.AdamW(params, lr)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate).step

    return make


def learned(checkpoint: str, lr: float, weight_decay: float | None) -> Make:
    """A checkpoint that is told the length of the run."""

    def make(params: list[nn.Parameter], steps: int) -> tuple[Optimizer, After]:
        optimizer = LearnedOptimizer(
            params, checkpoint, lr=lr, total_steps=steps, weight_decay=weight_decay
        )
        return optimizer, lambda: None

    return make


def main() -> None:
    """Print the table."""
    rows, ratios = [], []
    for seed in range(GAMES):
        game = Game.draw(seed)
        best = min(distance(game, adamw(lr)) for lr in ADAMW_LRS)
        ratios.append([distance(game, learned(*kind)) / best for kind in KINDS.values()])
        name = f"{'hinge' if game.hinge else 'softplus'}, penalty {game.penalty:g}, {game.steps:,}"
        rows.append([name, f"{best:.2f}", *(f"{ratio:.2f}" for ratio in ratios[-1])])
    columns = list(zip(*ratios, strict=True))
    means = [f"{geometric_mean(list(column))['mean']:.2f}" for column in columns]
    rows.append(["mean", "", *means])
    rows.append(["largest", "", *(f"{max(column):.2f}" for column in columns)])
    print(table(["game", "AdamW", *KINDS], rows))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
