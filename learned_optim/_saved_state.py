"""State dicts of the learned optimizer: what is saved, checked and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learned_optim import _guarded
from learned_optim._views import first_row, real_shape, repeat_rows

if TYPE_CHECKING:
    from learned_optim.optimizer import LearnedOptimizer

# Hyperparameters that groups of torch's own optimizers have and ours have not.
FOREIGN_KEYS = frozenset({"alpha", "betas", "dampening", "momentum", "nesterov", "rho"})
# Entries of earlier releases: numbers of updates, which now follow from "step" and the guard's age.
COUNT, ADAM_COUNT = "count", "guard_count"


def compact(optimizer: LearnedOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """State with the per-tensor entries as ``(k,)``, as files of all releases have them."""
    own = [param for group in optimizer.param_groups for param in group["params"]]
    result = {}
    for index, entries in state.items():
        param = own[index] if isinstance(index, int) else index
        per_tensor = optimizer._rule_for(param).tensor_state
        shape = real_shape(param)
        result[index] = {
            key: first_row(value, shape) if key in per_tensor else value
            for key, value in entries.items()
        }
    return result


def matched(
    optimizer: LearnedOptimizer, saved: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Own parameters with their saved state, by position."""
    own = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    for param, index in zip(own, ids, strict=False):
        yield param, saved["state"].get(index, {})


def has_as_many_parameters(optimizer: LearnedOptimizer, saved: dict[str, Any]) -> bool:
    """True if the saved groups are as many as the optimizer's, and of the same sizes."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return sizes == [len(group["params"]) for group in saved["param_groups"]]


def check_identity(saved: dict[str, Any], identity: dict[str, str]) -> None:
    """Raise ``ValueError`` if the state is another rule's, or another optimizer's."""
    rule = saved.get("rule")
    foreign = FOREIGN_KEYS.intersection(*(group.keys() for group in saved["param_groups"]))
    if rule is None and foreign:
        raise ValueError(
            f"loaded state dict belongs to another optimizer: its groups have "
            f"{', '.join(sorted(foreign))}, and its learning rate would scale learned updates"
        )
    if rule is not None and rule != identity:
        raise ValueError(
            f"loaded state dict belongs to the update rule {rule['name']!r} "
            f"({rule['fingerprint']}), and this optimizer runs {identity['name']!r} "
            f"({identity['fingerprint']}): construct it with the same checkpoint"
        )


def check_entries(optimizer: LearnedOptimizer, saved: dict[str, Any]) -> None:
    """Raise ``ValueError`` if entries of the rule are missing or misshapen; others may be there."""
    for param, state in matched(optimizer, saved):
        if not state:
            continue
        rule, shape = optimizer._rule_for(param), real_shape(param)
        fresh = optimizer._init_state(param)
        expected = {key: tuple(value.shape) for key, value in fresh.items()}
        if _guarded.SNAPSHOT not in state:  # a guard may be put on in mid-run
            expected = {k: v for k, v in expected.items() if k not in _guarded.GUARD_KEYS}
        elif _guarded.AGE not in state:
            expected.pop(_guarded.AGE, None)
        found = {}
        for key, value in state.items():
            if key in rule.tensor_state and isinstance(value, Tensor):
                value = first_row(value, shape)
            found[key] = tuple(value.shape) if isinstance(value, Tensor) else ()
        if any(found.get(key) != wanted for key, wanted in expected.items()):
            raise ValueError(
                f"loaded state dict does not fit the update rule {optimizer.rule.name!r}: for a "
                f"parameter of shape {tuple(param.shape)} it holds {found}, and the rule "
                f"keeps {expected}"
            )


def restore(optimizer: LearnedOptimizer, saved: dict[str, Any]) -> None:
    """Put the saved values back in their own dtypes, or in the one that the optimizer was told."""
    for param, entries in matched(optimizer, saved):
        if not entries:
            continue
        rule, state, shape = optimizer._rule_for(param), optimizer.state[param], real_shape(param)
        own = {"step", *rule.state_keys} & entries.keys()
        for key in own:
            value = entries[key]
            if not isinstance(value, Tensor):
                value = torch.tensor(float(value), dtype=torch.float32)
            per_tensor = key == "step" or key in rule.tensor_state
            dtype = value.dtype if per_tensor else optimizer._state_dtype_of(key) or value.dtype
            value = value.detach().to(param.device, dtype, copy=True)
            if key in rule.tensor_state:
                value = repeat_rows(first_row(value, shape), shape)
            state[key] = value
        for key in entries.keys() - own:  # a wrapper's, which torch has cast, and strings spoilt
            value = entries[key]
            if isinstance(value, Tensor):
                state[key] = value.detach().to(param.device, copy=True)
            else:
                state[key] = copy.deepcopy(value)
        sync_guard_state(optimizer, param, entries)


def sync_guard_state(optimizer: LearnedOptimizer, param: Tensor, saved: dict[str, Any]) -> None:
    """Make up for an earlier release, and for a guard that was put on or taken off."""
    state = optimizer.state[param]
    counts = {key: state.pop(key) for key in (COUNT, ADAM_COUNT) if is_count(key, state)}
    if optimizer.guard is None:
        for key in _guarded.GUARD_KEYS:
            state.pop(key, None)
        return
    fresh = optimizer._init_state(param)
    if _guarded.SNAPSHOT not in saved:
        state.update({key: fresh[key] for key in _guarded.GUARD_KEYS})
        state[_guarded.AGE] = state["step"].reshape(1).clone()
    elif _guarded.AGE not in saved:
        active = _guarded.report(optimizer.param_groups[0])["active"]
        age = counts.get(ADAM_COUNT if active else COUNT, state["step"])
        state[_guarded.AGE] = age.reshape(1).to(fresh[_guarded.AGE])
    state[_guarded.AGE] = repeat_rows(
        first_row(state[_guarded.AGE], real_shape(param)), real_shape(param)
    )


def is_count(key: str, state: dict[str, Any]) -> bool:
    """True if the entry is an earlier release's number of updates."""
    return isinstance(state.get(key), Tensor) and state[key].dim() == 0
