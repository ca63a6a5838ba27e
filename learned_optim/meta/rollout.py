"""Optimizees in the middle of their training: B runs of one task family, advanced side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import Segments, State, StepContext, UpdateRule
from learned_optim.rules._pieces import NETWORK_BLOCK


@dataclass(frozen=True)
class StepRecord:
    """What replay needs of one inner step, of ``m`` tensors packed in ``n`` coordinates.

    Attributes:
        losses: before the step, shape ``(B,)``.
        grad: shape ``(n,)``.
        features: input of the rule's network, shape ``(r, f)``.
        directions: shape ``(n, d)``.
    """

    losses: Tensor
    grad: Tensor
    features: Tensor
    directions: Tensor


class Optimizees:
    """Parameters, rule state and batch sources of B optimizees of the same structure.

    All tensors of all optimizees are packed into one vector, ordered by name and then by
    optimizee.

    Args:
        rule: the update rule whose state is kept.
        tasks: B tasks of one family.
        generators: one per task; draws initial parameters and then batches, so a run does not
            depend on which other runs it shares a batch with.
        dtype: the optimizees' dtype; batches are converted to it where floating.

    Attributes:
        packed: all parameters, shape ``(n,)``.
        segments: which coordinate belongs to which tensor.
        state: of the rule, entries ``(n, k)`` or ``(m, k)``.
        step: number of inner steps taken.
        carry: what an estimator keeps from unroll to unroll of these runs; gone with them.
    """

    def __init__(
        self,
        rule: UpdateRule,
        tasks: Sequence[Task],
        generators: Sequence[Generator],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._tasks, self._generators, self._dtype = tasks, generators, dtype
        initial = [task.init(g) for task, g in zip(tasks, generators, strict=True)]
        self._shapes = {name: value.shape for name, value in initial[0].items()}
        tensors = [params[name].to(dtype) for name in self._shapes for params in initial]
        self.packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.segments = Segments([tensor.shape for tensor in tensors], dtype=dtype)
        self.state = _pack_states(rule, [rule.init_state(tensor) for tensor in tensors])
        self.step = 0
        self.carry: object | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def copy(self) -> Optimizees:
        """Runs of their own from here, of the same tasks; they share the batch sources.

        Hand them batches, or else they take turns in drawing them. Nothing is carried over.
        """
        twin = copy.copy(self)
        # Parameters are replaced at every step, the network's state is changed in place.
        twin.state = {key: value.clone() for key, value in self.state.items()}
        twin.carry = None
        return twin

    @property
    def params(self) -> Params:
        """Parameters by the task's own names, each ``(B, *shape)``, as views."""
        return self.unpack(self.packed)

    def unpack(self, packed: Tensor) -> Params:
        """Packed values, ``(n,)``, by the task's own names, each ``(B, *shape)``, as views."""
        count = len(self)
        parts = packed.split([count * shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(count, *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def expand(self, values: Tensor) -> Tensor:
        """From one value per optimizee, ``(B,)``, to one per coordinate, ``(n,)``."""
        return self.segments.expand(values.repeat(len(self._shapes)))

    def next_batch(self) -> Batch:
        """The next batch of every optimizee, stacked: tensors of shape ``(B, ...)``."""
        pairs = zip(self._tasks, self._generators, strict=True)
        drawn = [task.batch(generator) for task, generator in pairs]
        return tuple(
            torch.stack(parts).to(self._dtype if parts[0].is_floating_point() else parts[0].dtype)
            for parts in zip(*drawn, strict=True)
        )

    def losses(self, packed: Tensor, batch: Batch) -> Tensor:
        """Loss of every optimizee, shape ``(B,)``."""
        loss, named = self._tasks[0].loss, self.unpack(packed)
        if len(self) == 1:  # vmap costs more than the whole step of a small network
            return loss({n: p[0] for n, p in named.items()}, tuple(b[0] for b in batch))[None]
        return torch.vmap(loss)(named, batch)

    def losses_and_grad(
        self, packed: Tensor, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses ``(B,)`` and their gradient, ``(n,)``."""
        if not create_graph:
            packed = packed.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(packed, batch)
            (grad,) = torch.autograd.grad(losses.sum(), packed, create_graph=create_graph)
        return losses, grad

    def context(self, rule: UpdateRule, losses: Tensor) -> StepContext:
        """The rule's context of the present step."""
        step = torch.full((len(self.segments),), float(self.step), dtype=self._dtype)
        loss = losses.repeat(len(self._shapes)) if rule.needs_loss else None
        return StepContext(step, loss)

    def forward(
        self, rule: UpdateRule, grad: Tensor, packed: Tensor, losses: Tensor
    ) -> tuple[Tensor, State]:
        """The rule's update and new state, differentiable in its weights."""
        context = self.context(rule, losses)
        return rule(grad, self.state, packed, self.segments, context)

    @torch.no_grad()
    def advance(self, rule: UpdateRule, batch: Batch | None = None) -> Tensor:
        """One inner step without a graph; returns the losses before it, ``(B,)``, detached.

        Args:
            batch: one of :meth:`next_batch`, which is called if none is given.
        """
        batch = self.next_batch() if batch is None else batch
        losses, grad = self.losses_and_grad(self.packed, batch)
        losses = losses.detach()
        if rule.rows == "none":
            update, new = self.forward(rule, grad, self.packed, losses)
            self.state = {**self.state, **new}
            self.packed = self.packed + update
            self.step += 1
        else:
            self._respond(rule, losses, grad)
        return losses

    @torch.no_grad()
    def advance_recorded(self, rule: UpdateRule) -> StepRecord:
        """:meth:`advance`, and what replay needs of the step."""
        losses, grad = self.losses_and_grad(self.packed, self.next_batch())
        return self._respond(rule, losses.detach(), grad)

    def _respond(self, rule: UpdateRule, losses: Tensor, grad: Tensor) -> StepRecord:
        """Observe, respond in place and block by block, and update."""
        context = self.context(rule, losses)
        features, directions, new = rule.observe(
            grad, self.state, self.packed, self.segments, context
        )
        assert features is not None
        self.state = {**self.state, **new}
        gains = []
        for start in range(0, len(features), NETWORK_BLOCK):
            rows = slice(start, start + NETWORK_BLOCK)
            network = {key: self.state[key][rows] for key in rule.network_state}
            gains.append(rule.respond_(features[rows], network))
        self.packed = self.packed + rule.mix(directions, torch.cat(gains), self.segments)
        self.step += 1
        return StepRecord(losses, grad, features, directions)


def _pack_states(rule: UpdateRule, states: Sequence[State]) -> State:
    """States of single tensors as one packed state, each column contiguous in memory."""
    packed = {}
    for key in states[0]:
        if key in rule.tensor_state:
            packed[key] = torch.stack([state[key] for state in states])
        else:
            columns = [state[key].reshape(-1, state[key].shape[-1]).t() for state in states]
            packed[key] = torch.cat(columns, 1).t()
    return packed
