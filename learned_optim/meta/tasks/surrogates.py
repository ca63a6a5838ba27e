"""A policy gradient and an adversarial pair, whose gradients are not those of the reported loss.

The policy (Williams 1992) swings a pendulum of unit mass and length up and holds it, by torques up
to 6. The state is its angle and speed. The cost of a step is the squared angle from the top, plus a
tenth of the squared speed, plus a thousandth of the squared torque; a run has 40 steps of a
twentieth of a second. The policy is a Gaussian of fixed spread around a network's output.
Advantages are costs to go less their mean over the batch of 32 pendulums, in units of their
standard deviation. The reported loss is the mean cost of a step.

Generator and discriminator (Goodfellow et al. 2014) learn eight Gaussians in a ring. They are one
set of parameters and step together: the gradient is that of the non-saturating losses, each in its
own network. Neither loss says how good the generator is, so the reported one is the sliced
Wasserstein distance (Rabin et al. 2012) between a batch of generated and one of real points, in
units of the ring's radius.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.tasks._base import Batch, EvaluationTask, ModuleTask, Params
from learned_optim.meta.tasks._examples import draws


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` with the gradient of ``surrogate``, both of shape ``()``."""
    return surrogate - surrogate.detach() + value.detach()


# ---- policy gradient

STEPS, PENDULUMS = 40, 32
TORQUE, DEVIATION, GRAVITY, SECONDS = 6.0, 0.3, 10.0, 0.05


def observed(state: Tensor) -> Tensor:
    """Observations of ``(n, 2)`` angles and speeds: cosine, sine, speed / 8."""
    angle, speed = state.unbind(-1)
    return torch.stack((angle.cos(), angle.sin(), speed / 8.0), -1)


def advance(state: Tensor, torque: Tensor) -> tuple[Tensor, Tensor]:
    """The next states ``(n, 2)``, and the costs ``(n,)`` of the present ones."""
    angle, speed = state.unbind(1)
    torque = TORQUE * torque.clamp(-1.0, 1.0)
    from_top = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    cost = from_top.square() + 0.1 * speed.square() + 1e-3 * torque.square()
    speed = speed + SECONDS * (1.5 * GRAVITY * angle.sin() + 3.0 * torque)
    speed = speed.clamp(-8.0, 8.0)
    return torch.stack((angle + SECONDS * speed, speed), 1), cost


def roll_out(
    policy: Callable[[Tensor], Tensor], state: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States ``(STEPS, n, 2)``, actions and costs ``(STEPS, n)`` from ``state`` ``(n, 2)``."""
    states, actions, costs = [], [], []
    for disturbance in noise:
        action = policy(observed(state)) + DEVIATION * disturbance
        states.append(state)
        actions.append(action)
        state, cost = advance(state, action)
        costs.append(cost)
    return torch.stack(states), torch.stack(actions), torch.stack(costs)


class Pendulum(ModuleTask):
    """Batches are initial states ``(n, 2)`` and the noise ``(STEPS, n)`` of the actions."""

    def __init__(self) -> None:
        super().__init__(_policy, lambda generator: _starts(PENDULUMS, generator))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        start, noise = batch
        policy = self._policy_of(params)
        with torch.no_grad():
            states, actions, costs = roll_out(policy, start, noise)
            to_go = costs.flip(0).cumsum(0).flip(0)
            advantage = (to_go - to_go.mean(1, keepdim=True)) / (to_go.std(1, keepdim=True) + 1e-6)
        log_probability = -0.5 * ((actions - policy(observed(states))) / DEVIATION).square()
        return with_gradient_of(costs.mean(), (advantage * log_probability).mean())

    def _policy_of(self, params: Params) -> Callable[[Tensor], Tensor]:
        return lambda seen: torch.func.functional_call(self.module, params, (seen,))[..., 0]

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        start, noise = _starts(256, draws(0))
        _, _, costs = roll_out(self._policy_of(params), start, torch.zeros_like(noise))
        return {"loss": costs.mean().item(), "cost at the end": costs[-10:].mean().item()}


def _policy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def _starts(count: int, generator: Generator) -> Batch:
    unit = torch.rand(count, 2, generator=generator)
    state = torch.stack((math.pi * (2 * unit[:, 0] - 1), 2 * unit[:, 1] - 1), 1)
    return state, torch.randn(STEPS, count, generator=generator)


# ---- adversarial pair

MODES, SPREAD, NOISE, BATCH_SIZE = 8, 0.05, 8, 128


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
        discriminates = F.softplus(-at_real).mean() + F.softplus(at_fake).mean()
        discriminates = discriminates + 0.5 * slopes.square().sum(1).mean()  # R1 penalty
        frozen = {name: p.detach() for name, p in params.items()}
        generates = F.softplus(-self._run("discriminator", frozen, fake)).mean()
        return with_gradient_of(sliced_distance(fake, real), discriminates + generates)

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


FAMILIES = {
    "policy-gradient": EvaluationTask(lambda _: Pendulum(), steps=1000, quick=300),
    "adversarial-pair": EvaluationTask(lambda _: Adversaries(), steps=4000, quick=1000),
}
