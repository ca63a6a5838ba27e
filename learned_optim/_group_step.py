"""One step of a parameter group: state in our layout, then one call of the rule.

A group whose tensors are those of the step before, as they are in nearly every step, is *bound*:
its call of the compiled kernel is prepared once, and a step only checks that nothing was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from learned_optim import _groups
from learned_optim._ambient import outliving_inference_mode, plain_arithmetic
from learned_optim._views import (
    dense,
    first_row,
    local,
    local_grad,
    real,
    real_shape,
    repeat_rows,
    shard_groups,
)
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._context import BoundStep
from learned_optim.rules._segments import is_sharded

if TYPE_CHECKING:
    from learned_optim.optimizer import LearnedOptimizer


# ---- state in our layout


def init_group(optimizer: LearnedOptimizer, group: dict[str, Any], entries: list[State]) -> None:
    """Create missing state of parameters with gradients, and accept what has been replaced.

    Args:
        optimizer: owns the state.
        group: a parameter group.
        entries: the accepted state entries by position in the group, see :func:`_accept`.
    """
    for position, param in enumerate(group["params"]):
        if len(entries) <= position:
            entries.append({})
        if param.grad is None:
            continue
        if param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"LearnedOptimizer does not support sparse gradients, and a parameter of shape "
                f"{tuple(param.shape)} has one of layout {param.grad.layout}: use sparse=False "
                f"in the embedding, or give that parameter to torch.optim.SparseAdam"
            )
        state = optimizer.state[param]
        rule = optimizer._rule_for(param)
        if "step" not in state:
            state.update({**optimizer._init_state(param), **state})
        for key in rule.state_keys:
            if state[key] is not entries[position].get(key):
                _accept(rule, param, state, key, entries[position])


def _accept(
    rule: UpdateRule, param: Tensor, state: dict[str, Any], key: str, entries: State
) -> None:
    """Bring a new state entry, a fresh or loaded one or what a tool left, into our layout.

    Of per-tensor entries, ``entries`` holds the base ``(k,)`` that the step writes to, and the
    state a view of it with the parameter's rows.
    """
    shape = real_shape(param)
    with outliving_inference_mode():
        if key in rule.tensor_state:
            entries[f"{key} base"] = first_row(state[key], shape).clone()
            state[key] = repeat_rows(entries[f"{key} base"], shape)
        elif not is_sharded(param):
            state[key] = dense(state[key])
    entries[key] = state[key]


def _rule_state(rule: UpdateRule, state: Mapping[str, Any], entries: State) -> dict[str, Any]:
    """State as the rule takes it: per-tensor entries ``(k,)``."""
    return {**state, **{key: entries[f"{key} base"] for key in rule.tensor_state}}


# ---- the general step


def step_group(
    optimizer: LearnedOptimizer,
    group: dict[str, Any],
    entries: list[State],
    loss: float | Tensor | None,
) -> None:
    """One call of the rule for all parameters of one device and one way of sharding."""
    for (device, groups, sharded), positions in _buckets(group["params"]).items():
        # Graphs know the sizes of shards as symbols, which cannot be packed: not compiled.
        run = _step_uncompiled if sharded else _step_tensors
        run(optimizer, group, entries, positions, device, groups, loss)


def _buckets(params: Sequence[Tensor]) -> dict[Any, list[int]]:
    """Positions of parameters with gradients by device and way of sharding."""
    found: dict[Any, list[int]] = {}
    for position, param in enumerate(params):
        if param.grad is not None:
            where = param.device, shard_groups(param), is_sharded(param)
            found.setdefault(where, []).append(position)
    return found


def _step_tensors(
    optimizer: LearnedOptimizer,
    group: dict[str, Any],
    entries: list[State],
    positions: list[int],
    device: torch.device,
    groups: tuple[Any, ...],
    loss: float | Tensor | None,
) -> None:
    params = [group["params"][position] for position in positions]
    rule = optimizer._rule_for(params[0])
    states: list[Any] = [optimizer.state[param] for param in params]
    if rule.tensor_state:
        own = [entries[position] for position in positions]
        states = [_rule_state(rule, *pair) for pair in zip(states, own, strict=True)]
    if is_sharded(params[0]):
        states = [{k: local(v) for k, v in state.items()} for state in states]
    with plain_arithmetic({device.type}):
        rule.step_(
            [real(local(param)) for param in params],
            [real(local_grad(param.grad, param)) for param in params],
            states,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            warmup=group["warmup"],
            loss=_groups.seen_loss(rule, loss, device) if optimizer.rule.needs_loss else None,
            total_steps=group["total_steps"],
            shapes=[real_shape(param) for param in params],
            shard_groups=groups,
        )


_step_uncompiled = _disable_dynamo(torch.no_grad()(_step_tensors))


# ---- the bound step


class BoundGroup:
    """A group whose rule has bound its step to the group's tensors.

    Args:
        params: of the group.
        states: of the parameters with gradients, as in ``optimizer.state``.
        rule: runs the step.
        step: of these parameters.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        rule: UpdateRule,
        step: BoundStep,
    ) -> None:
        self._params, self._states, self._step = list(params), states, step
        self._with_grad = [param for param in params if param.grad is not None]
        self._without_grad = [param for param in params if param.grad is None]
        self._entries_of = itemgetter("step", *rule.state_keys)
        self._entries = list(chain.from_iterable(map(self._entries_of, states)))

    def step_(self, optimizer: LearnedOptimizer, group: dict[str, Any]) -> bool:
        """The step; false, and nothing done, unless parameters and state are the same tensors."""
        params = group["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        if any(param.grad is not None for param in self._without_grad):
            return False
        states = list(map(optimizer.state.get, self._with_grad))
        if not all(map(is_, states, self._states)):
            return False
        try:
            entries = list(chain.from_iterable(map(self._entries_of, self._states)))
        except KeyError:  # a tool has taken one away
            return False
        return all(map(is_, entries, self._entries)) and self._step(
            [param.grad for param in self._with_grad],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            warmup=group["warmup"],
            total_steps=group["total_steps"],
        )


def bind(
    optimizer: LearnedOptimizer, group: dict[str, Any], entries: list[State]
) -> BoundGroup | None:
    """The group's step, if the rule can bind one to its tensors, which have stepped before."""
    if type(optimizer.rule).bind_step is UpdateRule.bind_step:
        return None
    buckets = _buckets(group["params"])
    if optimizer.guard is not None or optimizer.rule.needs_loss or len(buckets) != 1:
        return None
    (((_, _, sharded), positions),) = buckets.items()
    params = [group["params"][position] for position in positions]
    # Of complex numbers a step sees views, which stay behind when the data are replaced.
    if sharded or any(map(Tensor.is_complex, params)):
        return None
    rule = optimizer._rule_for(params[0])
    states = [optimizer.state[param] for param in params]
    own = [entries[position] for position in positions]
    step = rule.bind_step([*params], list(map(_rule_state, [rule] * len(own), states, own)))
    return None if step is None else BoundGroup(group["params"], states, rule, step)
