"""One step of an update rule for all copies of a population, each under weights of its own."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from learned_optim.meta.populations._base import Params
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._segments import VECTOR_SCALE, fan_in

# Options of the kernel that a configuration may set freely; all others are compiled in.
_FREE = ("base_step", "warmup_share")


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
        count = sum(p.numel() for p in rule.parameters())
        if weights.dim() != 2 or weights.shape[1] != count:
            raise ValueError(
                f"weights must have shape (copies, {count}) for rule {rule.name!r}, "
                f"got {tuple(weights.shape)}"
            )
        self.total_steps = total_steps
        self.params: Params = {
            name: value.detach().float().unsqueeze(0).repeat(len(weights), *[1] * value.dim())
            for name, value in initial.items()
        }
        for param in self.params.values():
            param.requires_grad_()
        vectors = list(weights.detach().float().contiguous().unbind())
        self._rules = [_with_weights(rule, vector) for vector in vectors]
        # Tensors in the order (name, copy); a slice of a contiguous tensor is contiguous.
        self._slices = [s for p in self.params.values() for s in p.detach().unbind()]
        self._states: list[State] = []
        for value in initial.values():
            self._states += [_first_state(rule, value) for _ in vectors]
        self._kernel_arguments = _kernel_arguments(
            rule, vectors * len(initial), list(initial.values()), len(vectors), self._states
        )

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of all copies.

        Args:
            grads: gradients of :attr:`params`, in their order.
        """
        slices = [s for grad in grads for s in grad.contiguous().unbind()]
        if self._kernel_arguments is not None and step(
            self._slices, slices, self.total_steps, **self._kernel_arguments
        ):
            return
        copies = len(self._rules)
        for index, rule in enumerate(self._rules):
            rule.step_(
                self._slices[index::copies],
                slices[index::copies],
                self._states[index::copies],
                total_steps=self.total_steps,
            )


def step(
    params: Sequence[Tensor], grads: Sequence[Tensor], total_steps: int | None, **arguments: Any
) -> bool:
    """One step in place by the compiled kernel; false, and nothing done, where there is none."""
    try:
        kernels = importlib.import_module("learned_optim.kernels")
    except ImportError:
        return False
    arguments = dict(arguments)
    columns = [arguments.pop(name) for name in ("fast", "slow", "square", "stats", "steps")]
    return bool(
        kernels.step_(
            arguments.pop("weights"), params, grads, *columns, arguments.pop("constants"),
            lr=1.0, total_steps=float(total_steps or 0), **arguments,
        )
    )  # fmt: skip


def _with_weights(rule: UpdateRule, vector: Tensor) -> UpdateRule:
    own = copy.deepcopy(rule)
    own.requires_grad_(False)
    vector_to_parameters(vector, own.parameters())
    return own


def _first_state(rule: UpdateRule, param: Tensor) -> State:
    return {"step": torch.zeros(()), **rule.init_state(param.detach().float())}


def _kernel_arguments(
    rule: UpdateRule, weights: list[Tensor], initial: list[Tensor], copies: int, states: list[State]
) -> dict[str, Any] | None:
    """What the kernel of the horizon rule takes besides parameters and gradients, or None."""
    if rule.name != "horizon":
        return None
    config = rule.config
    compiled = type(config)(**{name: getattr(config, name) for name in _FREE})
    if dataclasses.asdict(compiled) != dataclasses.asdict(config):
        return None
    constants, first_rms = [], []
    for value in initial:
        inputs = fan_in(value.shape) if value.dim() > 1 else 1
        scale = min(config.largest_scale, inputs**-0.5) if value.dim() > 1 else VECTOR_SCALE
        constants += [(scale, math.log(inputs), float(value.dim() < 2))] * copies
        first_rms += [value.double().square().mean().sqrt()] * copies
    for state, rms in zip(states, first_rms, strict=True):
        state["stats"][0] = rms
    columns = {key: [state[key] for state in states] for key in ("fast", "slow", "square", "stats")}
    return {
        **columns,
        "weights": weights,
        "steps": [state["step"] for state in states],
        "constants": constants,
        "base": config.base_step,
        "warmup_fraction": config.warmup_share,
    }
