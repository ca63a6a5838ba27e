"""A generative adversarial pair (Goodfellow et al. 2014) on eight Gaussians in a ring.

Generator and discriminator are one set of parameters and take their steps together: the gradient
is that of the non-saturating losses, each in its own network. Neither loss says how good the
generator is, so the reported loss is the sliced Wasserstein distance (Rabin et al. 2012) between a
batch of generated and one of real points, in units of the ring's radius.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import (
    Batch,
    Horizon,
    ModuleTask,
    Params,
    evaluation_family,
    with_gradient_of,
)
from learned_optim.meta.tasks._examples import draws

MODES, SPREAD, NOISE, BATCH_SIZE = 8, 0.05, 8, 128
PENALTY = 1.0  # of squared slopes


def sliced_distance(a: Tensor, b: Tensor, directions: int = 16) -> Tensor:
    """Mean Wasserstein-1 distance of two sets ``(n, 2)`` along evenly spread directions."""
    angles = torch.arange(directions) * math.pi / directions
    slices = torch.stack((angles.cos(), angles.sin()))  # (2, directions)
    return ((a @ slices).sort(0).values - (b @ slices).sort(0).values).abs().mean()


class Pair(nn.Module):
    """A generator from noise ``(n, 8)`` to points ``(n, 2)``, and a discriminator of points."""

    output_layers = ("generator.4.weight", "discriminator.4.weight")

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip


class Adversaries(ModuleTask):
    """Batches are real points ``(n, 2)`` and the generator's noise ``(n, 8)``."""

    module: Pair

    def __init__(self) -> None:
        super().__init__(Pair, _points)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        real, noise = batch
        fake = self._run("generator", params, noise)
        real = real.detach().requires_grad_()
        at_real = self._run("discriminator", params, real)
        at_fake = self._run("discriminator", params, fake.detach())
        (slopes,) = torch.autograd.grad(at_real.sum(), real, create_graph=True)
        told_apart = F.softplus(-at_real).mean() + F.softplus(at_fake).mean()
        told_apart = told_apart + 0.5 * PENALTY * slopes.square().sum(1).mean()
        frozen = {name: p.detach() for name, p in params.items()}
        fooled = F.softplus(-self._run("discriminator", frozen, fake)).mean()
        return with_gradient_of(sliced_distance(fake, real), told_apart + fooled)

    def _run(self, part: str, params: Params, x: Tensor) -> Tensor:
        prefix = part + "."
        own = {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}
        return torch.func.functional_call(getattr(self.module, part), own, (x,))

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        real, noise = _points(draws(0), 4000)
        fake = self._run("generator", params, noise)
        near = torch.cdist(fake, _centres()) < 3 * SPREAD  # (n, MODES)
        return {
            "loss": sliced_distance(fake, real).item(),
            "modes": float((near.float().mean(0) > 0.25 / MODES).sum()),
        }


def _centres() -> Tensor:
    angles = torch.arange(MODES) * 2 * math.pi / MODES
    return torch.stack((angles.cos(), angles.sin()), 1)


def _points(generator: Generator, count: int = BATCH_SIZE) -> Batch:
    mode = torch.randint(MODES, (count,), generator=generator)
    real = _centres()[mode] + SPREAD * torch.randn(count, 2, generator=generator)
    return real, torch.randn(count, NOISE, generator=generator)


def _adversaries(data: DataOptions) -> ModuleTask:
    return Adversaries()


FAMILIES = {"adversarial-pair": evaluation_family("adversarial-pair", _adversaries)}
FIELD = {"adversarial-pair": Horizon(4000, 1000)}
