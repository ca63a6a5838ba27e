"""The step of one parameter group, prepared once for its tensors."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from learned_optim import _groups
from learned_optim._ambient import plain_arithmetic
from learned_optim._owners import OwnersCall
from learned_optim._param_states import ParamStates
from learned_optim._views import local, local_grad, real, real_shape, shard_groups
from learned_optim._watch import GroupWatch
from learned_optim.rules import Shards, StepSettings, UpdateRule
from learned_optim.rules._segments import is_sharded

_grad_of = attrgetter("grad")


class GroupStep:
    """The step of a group for the tensors that it has now.

    Args:
        index: of the group.
        group: a parameter group; parameters with gradients have state in layout.
        states: of the optimizer's parameters.
        state: the optimizer's, by parameter.
        watch: observes the group's updates and warns of faults.
    """

    def __init__(
        self,
        index: int,
        group: dict[str, Any],
        states: ParamStates,
        state: MutableMapping[Tensor, Any],
        watch: GroupWatch,
    ) -> None:
        self._index, self._watch, self._rule = index, watch, states.rule
        self._params = list(group["params"])
        self._with_grad = [param for param in self._params if param.grad is not None]
        self._without_grad = [param for param in self._params if param.grad is None]
        self._grads = list(map(_grad_of, self._with_grad))
        self._states = [state[param] for param in self._with_grad]
        keys = self._rule.state_keys
        # itemgetter of a single key returns no tuple.
        self._entries_of = itemgetter("step", *keys) if keys else (lambda state: (state["step"],))
        found = [[k for k in self._rule.matrix_state if k in s] for s in self._states]
        self._matrices = found if any(found) else []
        self._entries = self._present_entries()
        self._settings: StepSettings | None = None  # of the last step
        self._calls = calls_of(index, group, states, state)
        self._bound = None
        if len(self._calls) == 1:
            (call,) = self._calls
            plain = isinstance(call, Call) and call.shards is None and not call.rule.needs_loss
            # A bound step would keep views of complex parameters whose data have been replaced.
            if plain and not any(map(Tensor.is_complex, call.params)):
                self._bound = call.rule.bind(call.params, call.states)
        if self._with_grad:
            watch.begin(self._states)

    def fits(self, params: Sequence[Tensor], state: MutableMapping[Tensor, Any]) -> bool:
        """True if parameters and state are the tensors of the preparation."""
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        self._grads = list(map(_grad_of, self._with_grad))
        if not all(map(is_not, self._grads, repeat(None))):
            return False
        if self._without_grad and any(p.grad is not None for p in self._without_grad):
            return False
        if not all(map(is_, map(state.get, self._with_grad), self._states)):
            return False
        try:
            return all(map(is_, self._present_entries(), self._entries))
        except KeyError:  # a tool has removed one
            return False

    def _present_entries(self) -> list[Tensor]:
        entries = list(chain.from_iterable(map(self._entries_of, self._states)))
        for keys, state in zip(self._matrices, self._states, strict=False):
            entries += [state[key] for key in keys]
        return entries

    def step_(self, group: dict[str, Any], loss: float | Tensor | None) -> None:
        """One update of all parameters with gradients; nothing at ``lr=0``.

        Args:
            group: its values are read, and checked where they are new.
            loss: for rules that read it.
        """
        lr, watch, settings = group["lr"], self._watch, self._settings
        grads, self._grads = self._grads, []  # zero_grad() must free them
        rate = lr if type(lr) is float and 0.0 < lr < math.inf else _groups.rate_of(lr, self._index)
        values = lr, group["weight_decay"], group["maximize"], group["warmup"], group["total_steps"]
        if settings is None or not all(map(is_, values, settings)):
            if settings is None or not all(map(is_, values[1:], settings[1:])):
                _groups.settle(self._rule, group)
                watch.expect(group)
            settings = self._settings = settings_of(group)
        if rate == 0.0 or not self._with_grad:
            return
        if self._bound is None or not self._bound(grads, settings):
            for call in self._calls:
                call.step_(settings, loss)
        watch.updates += 1
        if rate is not None:
            if rate < watch.rate:
                watch.fall(group, rate)
            watch.rate = rate
        if watch.updates >= watch.due:
            watch.look(self._states, grads)


def settings_of(group: dict[str, Any]) -> StepSettings:
    """The numbers of a step of a group."""
    return StepSettings(
        group["lr"], group["weight_decay"], group["maximize"], group["warmup"], group["total_steps"]
    )


class Call(NamedTuple):
    """One call of the rule: parameters of one device and sharding.

    Attributes:
        rule: on that device.
        params: with gradients.
        states: as :meth:`UpdateRule.step_` takes them.
        shards: the whole tensors, if the parameters are DTensors.
    """

    rule: UpdateRule
    params: list[Tensor]
    states: list[dict[str, Any]]
    shards: Shards | None

    def step_(self, settings: StepSettings, loss: float | Tensor | None) -> None:
        """The rule's step in place."""
        # Not compiled on shards: graphs know their sizes as symbols, which cannot be packed.
        (_step_tensors if self.shards is None else _step_uncompiled)(self, settings, loss)


def calls_of(
    index: int, group: dict[str, Any], states: ParamStates, state: MutableMapping[Tensor, Any]
) -> list[Call | OwnersCall]:
    """The calls of a group's step; its state must be in layout."""
    buckets: dict[Any, list[int]] = {}
    owners = states.owners
    places: dict[int, int] = {}
    for position, param in enumerate(group["params"]):
        if param.grad is not None:
            places[position] = len(places)
            dtype = param.dtype if owners.has(param) else None
            where = param.device, shard_groups(param), is_sharded(param), dtype
            buckets.setdefault(where, []).append(position)
    calls: list[Call | OwnersCall] = []
    for (_, groups, sharded, dtype), positions in buckets.items():
        params = [group["params"][i] for i in positions]
        own = [states.for_rule(index, i, state[p]) for i, p in zip(positions, params, strict=True)]
        if dtype is not None:
            staggers = [places[position] for position in positions]
            calls.append(OwnersCall(states.rule_on(params[0]), params, own, staggers, owners))
            continue
        shards = Shards([real_shape(p) for p in params], groups) if sharded else None
        calls.append(Call(states.rule_on(params[0]), params, own, shards))
    return calls


def _step_tensors(call: Call, settings: StepSettings, loss: float | Tensor | None) -> None:
    rule, params = call.rule, call.params
    device = params[0].device
    if rule.needs_loss:
        if loss is None:
            raise ValueError(
                f"the update rule {rule.name!r} of this optimizer reads the loss: call "
                f"step(closure) with a closure that returns it"
            )
        finite = torch.as_tensor(loss, dtype=rule.dtype, device=device)
        finite = torch.nan_to_num(finite, nan=0.0, posinf=0.0, neginf=0.0)
        settings = StepSettings(*settings[:-1], finite)
    with plain_arithmetic(device.type):
        rule.step_(
            [real(local(param)) for param in params],
            [real(local_grad(param.grad, param)) for param in params],
            call.states,
            settings,
            call.shards,
        )


_step_uncompiled = _disable_dynamo(torch.no_grad()(_step_tensors))
