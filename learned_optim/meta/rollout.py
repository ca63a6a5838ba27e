"""Optimizees in training: B runs of a task family, side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learned_optim.meta.seeding import global_generator_seeded
from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import Segments, State, StepContext, UpdateRule
from learned_optim.rules._step import BLOCK


@dataclass(frozen=True)
class StepRecord:
    """One inner step as replay needs it; ``n`` coordinates, ``r`` rows.

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
    """Parameters, rule state and batch sources of B optimizees.

    All tensors of all optimizees are packed into one vector: ordered by name and then by optimizee
    if stacked, and by optimizee and then by name otherwise.

    Args:
        rule: the update rule; sets the initial state.
        tasks: B tasks of one family.
        generators: one per task; draws initial parameters and then batches, so a run does not
            depend on the runs beside it.
        dtype: of parameters and of floating batches.
        stacked: compute all losses in one forward pass, under ``vmap``. The tasks must share shapes
            and a loss that draws nothing at random and updates no buffers. Otherwise losses are
            computed one after another: each optimizee has its own buffers, and its dropout masks
            follow from its generator and the step.

    Attributes:
        packed: all parameters, shape ``(n,)``.
        segments: which coordinate belongs to which tensor.
        state: of the rule, entries ``(n, k)`` or ``(m, k)``.
        step: number of inner steps taken.
        carry: of persistent evolution strategies, between the unrolls of these runs: the particles,
            opposite ones side by side, and the sums of perturbations of their pairs, in units of
            sigma, ``(pairs, weights)``.
    """

    def __init__(
        self,
        rule: UpdateRule,
        tasks: Sequence[Task],
        generators: Sequence[Generator],
        dtype: torch.dtype = torch.float32,
        *,
        stacked: bool = True,
    ) -> None:
        self._tasks = [task.separate() for task in tasks]
        self._generators, self._dtype, self._stacked = generators, dtype, stacked
        initial = [task.init(g) for task, g in zip(self._tasks, generators, strict=True)]
        if stacked:
            order = [(b, name) for name in initial[0] for b in range(len(initial))]
            named = {n: torch.Size((len(initial), *p.shape)) for n, p in initial[0].items()}
            self._shapes = [named]
        else:
            order = [(b, name) for b, params in enumerate(initial) for name in params]
            self._shapes = [{name: p.shape for name, p in params.items()} for params in initial]
        tensors = [initial[b][name].to(dtype) for b, name in order]
        self._owners = torch.tensor([b for b, _ in order])  # (m,)
        self.packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.segments = Segments([tensor.shape for tensor in tensors], dtype=dtype)
        self.state = pack_states(rule, [rule.init_state(tensor) for tensor in tensors])
        self.step = 0
        # Of the tasks, before the forward pass of step `_buffered`, and after it.
        self._buffers = self._updated = [task.buffers() for task in self._tasks]
        self._buffered = 0
        self.carry: tuple[list[Optimizees], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def copy(self) -> Optimizees:
        """Independent runs from the present state, without :attr:`carry`.

        Batch sources are shared, so draw a batch once and give it to both.
        """
        twin = copy.copy(self)
        # Parameters are replaced at every step, the network's state is changed in place.
        twin.state = {key: value.clone() for key, value in self.state.items()}
        twin.carry = None
        return twin

    def _unpack(self, packed: Tensor) -> list[Params]:
        """Views by name: of each optimizee, or once, ``(B, *shape)``, if they are stacked."""
        sizes = [shape.numel() for shapes in self._shapes for shape in shapes.values()]
        parts = iter(packed.split(sizes))
        return [
            {name: next(parts).view(shape) for name, shape in shapes.items()}
            for shapes in self._shapes
        ]

    def next_batch(self) -> list[Batch]:
        """The next batch of each optimizee, or one of tensors ``(B, ...)`` if stacked.

        Raises:
            ValueError: batches of stacked optimizees differ in shape.
        """
        pairs = zip(self._tasks, self._generators, strict=True)
        drawn = [task.batch(generator) for task, generator in pairs]
        if not self._stacked:
            return [floating(batch, self._dtype) for batch in drawn]
        try:
            together = tuple(map(torch.stack, zip(*drawn, strict=True)))
        except RuntimeError as error:
            shapes = "; ".join(str([tuple(x.shape) for x in batch]) for batch in drawn)
            raise ValueError(
                f"the batches of optimizees side by side differ in shape ({shapes}): drop the "
                f"smaller ones, or declare the task with FixedTask(task, stackable=False)"
            ) from error
        return [floating(together, self._dtype)]

    def losses(self, packed: Tensor, batch: list[Batch]) -> Tensor:
        """Loss of every optimizee, ``(B,)``; repeated calls within a step agree."""
        if not self._stacked:
            return self._losses_one_by_one(packed, batch)
        loss, (named,), (stack,) = self._tasks[0].loss, self._unpack(packed), batch
        if len(self) == 1:  # vmap costs more than the whole step of a small network
            return loss({n: p[0] for n, p in named.items()}, tuple(b[0] for b in stack))[None]
        return torch.vmap(loss)(named, stack)

    def _losses_one_by_one(self, packed: Tensor, batches: list[Batch]) -> Tensor:
        if self.step > self._buffered:
            self._buffers, self._buffered = self._updated, self.step
        losses, updated = [], []
        each = zip(self._tasks, self._generators, self._unpack(packed), batches, strict=True)
        for index, (task, generator, params, batch) in enumerate(each):
            # Clones, because forward passes update buffers in place.
            task.load_buffers({name: b.clone() for name, b in self._buffers[index].items()})
            with global_generator_seeded("forward", generator.initial_seed(), self.step):
                losses.append(task.loss(params, batch))
            updated.append(task.buffers())
        self._updated = updated
        return torch.stack(losses)

    def losses_and_grad(
        self, packed: Tensor, batch: list[Batch], create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses ``(B,)`` and their gradient, ``(n,)``."""
        if not create_graph:
            packed = packed.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(packed, batch)
            (grad,) = torch.autograd.grad(losses.sum(), packed, create_graph=create_graph)
        return losses, grad

    def _context(self, rule: UpdateRule, losses: Tensor) -> StepContext:
        step = torch.full((len(self.segments),), float(self.step), dtype=self._dtype)
        loss = losses[self._owners] if rule.needs_loss else None
        return StepContext(step, loss)

    def forward(
        self, rule: UpdateRule, grad: Tensor, packed: Tensor, losses: Tensor
    ) -> tuple[Tensor, State]:
        """The rule's update and new state, differentiable in its weights."""
        context = self._context(rule, losses)
        return rule(grad, self.state, packed, self.segments, context)

    @torch.no_grad()
    def advance(self, rule: UpdateRule, batch: list[Batch] | None = None) -> Tensor:
        """One inner step without a graph; returns the losses before it, ``(B,)``.

        :meth:`next_batch` is called if no batch is given.
        """
        if rule.rows != "none":
            return self.advance_recorded(rule, batch).losses
        losses, grad = self.losses_and_grad(self.packed, batch or self.next_batch())
        update, new = self.forward(rule, grad, self.packed, losses.detach())
        self.state = {**self.state, **new}
        self.packed = self.packed + update
        self.step += 1
        return losses.detach()

    @torch.no_grad()
    def advance_recorded(self, rule: UpdateRule, batch: list[Batch] | None = None) -> StepRecord:
        """:meth:`advance`, block by block and the network in place; returns its record."""
        losses, grad = self.losses_and_grad(self.packed, batch or self.next_batch())
        losses = losses.detach()
        context = self._context(rule, losses)
        features, directions, new = rule.observe(
            grad, self.state, self.packed, self.segments, context
        )
        assert features is not None
        self.state = {**self.state, **new}
        gains = []
        for start in range(0, len(features), BLOCK):
            rows = slice(start, start + BLOCK)
            network = {key: self.state[key][rows] for key in rule.network_state}
            gains.append(rule.respond_(features[rows], network))
        self.packed = self.packed + rule.mix(directions, torch.cat(gains), self.segments)
        self.step += 1
        return StepRecord(losses, grad, features, directions)


def floating(batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch with its floating tensors in ``dtype``."""
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


def pack_states(rule: UpdateRule, states: Sequence[State]) -> State:
    """States of single tensors as one packed state of contiguous columns."""
    packed = {}
    for key in states[0]:
        if key in rule.tensor_state:
            packed[key] = torch.stack([state[key] for state in states])
        else:
            columns = [state[key].reshape(-1, state[key].shape[-1]).t() for state in states]
            packed[key] = torch.cat(columns, 1).t()
    return packed
