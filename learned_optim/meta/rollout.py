"""Optimizees in the middle of their training: B runs of one task family, advanced side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import RecurrentRule, State, UpdateRule

#: Key under which a coordinatewise rule sees all parameters as one tensor.
PACKED = "packed"


class Optimizees:
    """Parameters, rule state and batch sources of B optimizees of the same structure.

    A coordinatewise rule sees all parameters as one packed tensor of shape ``(B, n)``; any other
    rule sees each parameter as ``(B, *shape)`` and is mapped over the first dimension.

    Args:
        rule: the update rule whose state is kept.
        tasks: B tasks of one family.
        generators: one per task; draws initial parameters and then batches, so a run does not
            depend on which other runs it shares a batch with.
        dtype: the optimizees' dtype; batches are converted to it where floating.
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
        stacked = {n: torch.stack([p[n] for p in initial]).to(dtype) for n in self._shapes}
        if rule.coordinatewise:
            stacked = {PACKED: torch.cat([v.flatten(1) for v in stacked.values()], dim=1)}
        self.params: Params = stacked
        self.state: dict[str, State] = {}
        for name, value in stacked.items():
            if rule.coordinatewise:
                self.state[name] = rule.init_state(value)
            else:
                # Cloned, because vmap returns what does not depend on its input as an expanded
                # view, whose rows share the memory that rules then write to.
                state = torch.vmap(rule.init_state)(value)
                self.state[name] = {key: entry.clone() for key, entry in state.items()}
        self.step = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def next_batch(self) -> Batch:
        """The next batch of every optimizee, stacked: tensors of shape ``(B, ...)``."""
        pairs = zip(self._tasks, self._generators, strict=True)
        drawn = [task.batch(generator) for task, generator in pairs]
        return tuple(
            torch.stack(parts).to(self._dtype if parts[0].is_floating_point() else parts[0].dtype)
            for parts in zip(*drawn, strict=True)
        )

    def unpack(self, params: Params) -> Params:
        """Parameters by the task's own names, each ``(B, *shape)``, as views."""
        if PACKED not in params:
            return params
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = params[PACKED].split(sizes, dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Loss of every optimizee, shape ``(B,)``."""
        loss, named = self._tasks[0].loss, self.unpack(params)
        if len(self) == 1:  # vmap costs more than the whole step of a small network
            return loss({n: p[0] for n, p in named.items()}, tuple(b[0] for b in batch))[None]
        return torch.vmap(loss)(named, batch)

    def losses_and_grads(
        self, params: Params, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Params]:
        """Losses ``(B,)`` and their gradients, keyed and shaped like ``params``."""
        if not create_graph:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            losses = self.losses(params, batch)
            grads = torch.autograd.grad(
                losses.sum(), list(params.values()), create_graph=create_graph
            )
        return losses, dict(zip(params, grads, strict=True))

    @torch.no_grad()
    def advance(self, rule: UpdateRule) -> Tensor:
        """One inner step on the fast path; returns the losses before it, ``(B,)``, detached."""
        losses, grads = self.losses_and_grads(self.params, self.next_batch())
        losses = losses.detach()
        for name, grad in grads.items():
            self.params[name] += self.update_(rule, name, grad, losses)
        self.step += 1
        return losses

    def update_(self, rule: UpdateRule, name: str, grad: Tensor, losses: Tensor) -> Tensor:
        """The rule's update for one parameter, advancing its state in place."""
        if rule.coordinatewise:
            loss = losses.unsqueeze(1) if rule.needs_loss else None
            return rule.update_(grad, self.state[name], self.params[name], loss)
        return torch.stack([rule.update_(*each) for each in self._separately(name, grad, losses)])

    def recorded_update_(
        self, rule: RecurrentRule, name: str, grad: Tensor, losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`update_`, and the signals the network saw, of shape ``(B * n, k)``."""
        parts = [(grad, self.state[name], self.params[name], losses.unsqueeze(1))]
        if not rule.coordinatewise:
            parts = self._separately(name, grad, losses)
        seen = [rule.observe_(*part).reshape(part[0].numel(), -1) for part in parts]
        updates = [
            rule.respond_to_all_(signals, part[1])
            for signals, part in zip(seen, parts, strict=True)
        ]
        return torch.cat(updates).view(grad.shape), torch.cat(seen)

    def _separately(
        self, name: str, grad: Tensor, losses: Tensor
    ) -> list[tuple[Tensor, State, Tensor, Tensor]]:
        """What a rule is called with for each optimizee; the states are views."""
        state, param = self.state[name], self.params[name]
        return [
            (grad[b], {key: value[b] for key, value in state.items()}, param[b], losses[b])
            for b in range(len(self))
        ]

    def forward(
        self, rule: UpdateRule, name: str, grad: Tensor, param: Tensor, losses: Tensor
    ) -> tuple[Tensor, State]:
        """The rule's update and new state for one parameter, differentiable in its weights."""
        if rule.coordinatewise:
            loss = losses.unsqueeze(1) if rule.needs_loss else None
            return rule(grad, self.state[name], param, loss)
        return torch.vmap(rule)(grad, self.state[name], param, losses)

    def test(self) -> list[dict[str, float]]:
        """Held-out figures of every optimizee at its current parameters."""
        named = self.unpack(self.params)
        return [t.test({n: p[b] for n, p in named.items()}) for b, t in enumerate(self._tasks)]
