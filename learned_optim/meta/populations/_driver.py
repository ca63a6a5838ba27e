"""One step of an update rule for all copies of a population, each under weights of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from learned_optim import kernels
from learned_optim.meta.populations._base import Params, copies_of
from learned_optim.rules import State, StepSettings, UpdateRule
from learned_optim.rules.horizon import HorizonRule


class CopiesOptimizer:
    """Trains ``B`` copies of the same parameters, copy ``b`` by the rule with weights ``b``.

    Where the rule has a compiled kernel, one call of it steps all tensors of all copies. Otherwise
    each copy is stepped by :meth:`UpdateRule.step_`, correct and slow.

    Args:
        rule: gives architecture and configuration; its weights do not matter.
        weights: float32 of shape ``(B, number of weights)``, in the order of ``rule.parameters()``.
        initial: the parameters of one copy by name, from which all copies begin.
        total_steps: length of the run, if the rule is to know it.

    Attributes:
        params: the copies by name, float32 leaves of shape ``(B, *shape)``.
    """

    def __init__(
        self, rule: UpdateRule, weights: Tensor, initial: Params, total_steps: int | None = None
    ) -> None:
        self.params = copies_of(initial, len(weights))
        decay = rule.default_weight_decay(total_steps)
        self._settings = StepSettings(weight_decay=decay, total_steps=total_steps)
        self._rules = [_with_weights(rule, vector) for vector in weights]
        # Tensors in the order (name, copy); a slice of a contiguous tensor is contiguous.
        self._slices = [s for p in self.params.values() for s in p.detach().unbind()]
        self._states = [
            state
            for value in initial.values()
            for state in _first_states(rule, value, len(weights))
        ]
        self._rotation = None
        if isinstance(rule, HorizonRule):  # all copies of a matrix are refreshed in the same step
            staggers = [index for index in range(len(initial)) for _ in self._rules]
            self._rotation = rule.rotation(self._slices, self._states, staggers)
        # Weights of the network of every slice, stacked: (slices, *shape).
        self._networks = [
            torch.stack(columns).repeat(len(initial), *[1] * columns[0].dim())
            for columns in zip(*(own.parameters() for own in self._rules), strict=True)
        ]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of all copies.

        Args:
            grads: gradients of :attr:`params`, in their order.
        """
        slices = [s for grad in grads for s in grad.contiguous().unbind()]
        states, settings = self._states, self._settings
        if not isinstance(self._rules[0], HorizonRule):
            for own, *of in self._by_copy(slices, states):
                own.step_(*of, settings)
            return
        seen: Sequence[Tensor] = slices
        updates: Sequence[Tensor | None] = [None] * len(slices)
        if self._rotation is not None:
            seen, updates = self._rotation.rotate(slices)
        if not kernels.step_(self._networks, self._slices, seen, states, settings, updates=updates):
            for own, params, part, of, apart in self._by_copy(seen, states, updates):
                own.step_(params, part, of, settings, updates=apart)
        if self._rotation is not None:
            self._rotation.rotate_back()

    def _by_copy(self, *columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Each copy's rule, parameters and part of every column."""
        copies = len(self._rules)
        for index, rule in enumerate(self._rules):
            yield rule, *(column[index::copies] for column in (self._slices, *columns))


def _with_weights(rule: UpdateRule, vector: Tensor) -> UpdateRule:
    own = copy.deepcopy(rule).requires_grad_(False)
    vector_to_parameters(vector.detach().float().clone(), own.parameters())
    return own


def _first_states(rule: UpdateRule, param: Tensor, copies: int) -> list[State]:
    """States of all copies of a parameter, each entry side by side in memory."""
    param = param.detach().float()
    matrices = rule.init_matrices(param.shape, param.device)
    fresh = {"step": torch.zeros(()), **rule.init_state(param), **matrices}
    stacks = {key: value.repeat(copies, *[1] * value.dim()) for key, value in fresh.items()}
    return [{key: stack[copy] for key, stack in stacks.items()} for copy in range(copies)]
