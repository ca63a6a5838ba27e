"""Optimizees in the middle of their training: B runs of one task family, advanced side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import RecurrentRule, State, TensorRule, UpdateRule

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

    def tensor_sizes(self) -> dict[str, list[int]]:
        """Coordinates of each tensor of each optimizee, by the key and in the order of `params`."""
        sizes = {name: shape.numel() for name, shape in self._shapes.items()}
        if PACKED in self.params:
            return {PACKED: list(sizes.values()) * len(self)}
        return {name: [size] * len(self) for name, size in sizes.items()}

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
        if rule.coordinatewise:
            param, loss = self.params[PACKED], _packed_loss(rule, losses)
            update = rule.update_(grads[PACKED], self.state[PACKED], param, loss)
            self.params[PACKED] = param + update
        else:
            self._update_tensors(rule, grads)
        self.step += 1
        return losses

    @torch.no_grad()
    def advance_steered(self, rule: TensorRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`advance`, and what replay needs of the step; tensors in the order of ``params``.

        Returns:
            ``(losses, grad, features, directions)``: losses ``(B,)``; gradients of all tensors
            behind each other, ``(n,)``; features ``(m, k)`` and scaled directions ``(n, d)``.
        """
        losses, grads = self.losses_and_grads(self.params, self.next_batch())
        features, directions = self._update_tensors(rule, grads, record=True)
        self.step += 1
        flat = torch.cat([grad.reshape(-1) for grad in grads.values()])
        return losses.detach(), flat, features, directions

    @torch.no_grad()
    def advance_recorded(self, rule: RecurrentRule) -> tuple[Tensor, Params, Params]:
        """:meth:`advance`, and what replay needs of the step.

        Returns:
            ``(losses, grads, signals)``: losses ``(B,)``; gradients keyed and shaped like
            ``params``; what the network saw, keyed like them, each ``(B * n, k)``.
        """
        losses, grads = self.losses_and_grads(self.params, self.next_batch())
        losses = losses.detach()
        if rule.coordinatewise:
            grad, state, param = grads[PACKED], self.state[PACKED], self.params[PACKED]
            seen = rule.observe_(grad, state, param, _packed_loss(rule, losses))
            signals = {PACKED: seen.reshape(grad.numel(), -1)}
            update = rule.respond_to_all_(signals[PACKED], state)
            self.params[PACKED] = param + update.view_as(grad)
        else:
            seen = self._update_tensors(rule, grads, record=True)
            parts = seen.split([grad.numel() for grad in grads.values()])
            signals = dict(zip(grads, parts, strict=True))
        self.step += 1
        return losses, grads, signals

    def _update_tensors(self, rule: UpdateRule, grads: Params, record: bool = False) -> Any:
        """Update every tensor of every optimizee; returns what ``update_many_`` recorded."""
        params, count = self.params, len(self)
        each_grad = [g for grad in grads.values() for g in grad]
        each_param = [p for name in grads for p in params[name]]
        each_state = [  # views, so that the rule writes through them
            {key: value[b] for key, value in self.state[name].items()}
            for name in grads
            for b in range(count)
        ]
        updates, seen = rule.update_many_(each_grad, each_state, each_param, record=record)
        for index, name in enumerate(grads):
            update = torch.stack(updates[index * count : (index + 1) * count])
            params[name] = params[name] + update
        return seen

    def forward(
        self, rule: UpdateRule, name: str, grad: Tensor, param: Tensor, losses: Tensor
    ) -> tuple[Tensor, State]:
        """The rule's update and new state for one parameter, differentiable in its weights."""
        if rule.coordinatewise:
            return rule(grad, self.state[name], param, _packed_loss(rule, losses))
        return torch.vmap(rule)(grad, self.state[name], param, losses)


def _packed_loss(rule: UpdateRule, losses: Tensor) -> Tensor | None:
    """The losses ``(B,)`` beside packed parameters ``(B, n)``, for a rule that reads them."""
    return losses.unsqueeze(1) if rule.needs_loss else None
