"""A policy gradient (Williams 1992) on a small control problem, written out in torch.

A pendulum of unit mass and length, with torques up to 6, is to be swung up and held: the state is
its angle and speed, the cost of a step the squared angle from the top, plus a tenth of the squared
speed, plus a thousandth of the squared torque, in 40 steps of a twentieth of a second. The policy
is a Gaussian of fixed spread around a network's output; advantages are costs to go less their mean
over the batch of 32 pendulums, in units of their standard deviation. The reported loss is the mean
cost of a step, which the optimizer sees through the gradient's estimate alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
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

STEPS, PENDULUMS = 40, 32
TORQUE, SPREAD, GRAVITY, SECONDS = 6.0, 0.3, 10.0, 0.05


def observed(state: Tensor) -> Tensor:
    """What the policy sees of ``(n, 2)`` angles and speeds: cosine, sine, speed / 8."""
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
        action = policy(observed(state)) + SPREAD * disturbance
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

        def policy(observation: Tensor) -> Tensor:
            return torch.func.functional_call(self.module, params, (observation,))[..., 0]

        with torch.no_grad():
            states, actions, costs = roll_out(policy, start, noise)
            to_go = costs.flip(0).cumsum(0).flip(0)
            advantage = (to_go - to_go.mean(1, keepdim=True)) / (to_go.std(1, keepdim=True) + 1e-6)
        log_probability = -0.5 * ((actions - policy(observed(states))) / SPREAD).square()
        return with_gradient_of(costs.mean(), (advantage * log_probability).mean())

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        start, noise = _starts(256, draws(0))

        def policy(observation: Tensor) -> Tensor:
            return torch.func.functional_call(self.module, params, (observation,))[..., 0]

        _, _, costs = roll_out(policy, start, torch.zeros_like(noise))
        return {"loss": costs.mean().item(), "cost at the end": costs[-10:].mean().item()}


def _policy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def _starts(count: int, generator: Generator) -> Batch:
    unit = torch.rand(count, 2, generator=generator)
    state = torch.stack((math.pi * (2 * unit[:, 0] - 1), 2 * unit[:, 1] - 1), 1)
    return state, torch.randn(STEPS, count, generator=generator)


def _pendulum(data: DataOptions) -> ModuleTask:
    return Pendulum()


FAMILIES = {"policy-gradient": evaluation_family("policy-gradient", _pendulum)}
FIELD = {"policy-gradient": Horizon(1000, 300)}
