"""The state of an optimizer's parameters: created, laid out, saved, checked, restored.

Entries of a parameter of shape ``S``: ``step``, shape ``()``; per coordinate, ``(*S, k)``, sharded
like the parameter; per tensor, ``(k,)``; and matrices of the tensor. Tools that prune or append
rows of a parameter cut every entry but ``step`` along its first dimension. So the optimizer's state
holds small entries without the parameter's rows as views with repeated rows, which cost no memory.
State dicts hold them once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from learned_optim._ambient import outliving_inference_mode
from learned_optim._frozen import FrozenRule
from learned_optim._groups import FOREIGN, OWN_KEYS
from learned_optim._owners import Owners
from learned_optim._tensors import has_values, lie_side_by_side
from learned_optim._views import dense, local, real, real_shape, shard_groups, shard_like
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._segments import is_sharded

# Larger entries are not repeated along the rows: copies to another device would be made in full.
MOST_REPEATED = 1 << 12


class ParamStates:
    """State entries of parameters, in the layout that the rule's step takes.

    The entries themselves lie in ``optimizer.state``, which loading and tools may replace.

    Args:
        rule: the update rule.
        dtype: of per-coordinate entries; ``None`` for the rule's own.
    """

    def __init__(self, rule: FrozenRule, dtype: torch.dtype | None) -> None:
        self.rule = rule.rule
        self._frozen, self._dtype = rule, dtype
        self.owners = Owners(rule.rule)
        # Entries in layout, by group and position. Entries that the state holds as views with
        # repeated rows are also here without those rows, under compact_key().
        self._laid_out: list[list[State]] = []

    def rule_on(self, param: Tensor) -> UpdateRule:
        """The rule with its weights on the device of ``param``."""
        return self._frozen.on(param)

    # ---- creation and layout

    def create(self, param: Tensor) -> State:
        """State before the first gradient: the number of steps, and the rule's entries."""
        with outliving_inference_mode():
            rule, own, shape = self.rule_on(param), real(local(param)), real_shape(param)
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            if self.owners.elsewhere(param):
                # Empty entries: tools ask the live state for its keys, and all ranks must agree.
                matrices = rule.init_matrices(shape, torch.device("meta"))
                empty = torch.empty(0, device=param.device)
                return {"step": step, **dict.fromkeys((*rule.state_keys, *matrices), empty)}
            owned = self.owners.has(param)
            cut = is_sharded(param) and not owned
            state = rule.init_state(own.new_empty(shape) if owned else own)
            for key in state.keys() - {*rule.tensor_state}:
                value = dense(state[key].to(self._dtype or state[key].dtype))
                state[key] = shard_like(param, value) if cut else value
            in_part = cut and bool(shard_groups(param))
            matrices = {} if in_part else rule.init_matrices(shape, param.device)
            return {"step": step, **state, **matrices}

    def lay_out(self, index: int, params: list[Tensor], states: Mapping[Tensor, Any]) -> None:
        """Create missing state of parameters with gradients; bring replaced entries into layout.

        ``index`` and ``params`` are a group's, ``states`` the optimizer's, by parameter.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        self._laid_out += ([] for _ in range(index + 1 - len(self._laid_out)))
        known = self._laid_out[index]
        known += ({} for _ in range(len(params) - len(known)))
        self.owners.assign(params)
        for position, param in enumerate(params):
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"LearnedOptimizer does not support sparse gradients, and a parameter of shape "
                    f"{tuple(param.shape)} has one of layout {param.grad.layout}: use sparse=False "
                    f"in the embedding, or give that parameter to torch.optim.SparseAdam"
                )
            self._lay_out(param, states[param], known[position])
        if self.rule.matrix_state:
            self._gather_matrices(params, states, known)

    def _gather_matrices(
        self, params: list[Tensor], states: Mapping[Tensor, Any], known: list[State]
    ) -> None:
        """Lay matrices of equal shape side by side, as one batch."""
        found: dict[Any, list[int]] = {}
        for index, (param, entries) in enumerate(zip(params, known, strict=False)):
            kind = real_shape(param), param.dtype, param.device
            for key in self.rule.matrix_state:
                if compact_key(key) in entries and entries[compact_key(key)].numel() > 1:
                    found.setdefault((key, *kind), []).append(index)
        for (key, shape, *_), indices in found.items():
            own = [known[index][compact_key(key)] for index in indices]
            if len(own) == 1 or lie_side_by_side(own):
                continue
            with outliving_inference_mode():
                for index, value in zip(indices, torch.stack(own), strict=True):
                    known[index][compact_key(key)] = value
                    known[index][key] = states[params[index]][key] = with_rows(value, shape)

    def _lay_out(self, param: Tensor, state: dict[str, Any], known: State) -> None:
        rule, shape = self.rule_on(param), real_shape(param)
        keys = (*rule.state_keys, *rule.matrix_state)
        if "step" not in state:
            known.clear()
            state.update({**self.create(param), **state})
        elif rule.matrix_state and any(state.get(key) is not known.get(key) for key in keys):
            keep_fitting_matrices(rule, state, self.create(param), shape)
        for key in keys:
            if key not in state:
                known.pop(key, None)
                known.pop(compact_key(key), None)
                continue
            if state[key] is known.get(key):
                continue
            with outliving_inference_mode():
                if key in rule.tensor_state or key in rule.matrix_state:
                    known[compact_key(key)] = without_rows(rule, key, state[key], shape).clone()
                    state[key] = with_rows(known[compact_key(key)], shape)
                elif not is_sharded(param):
                    state[key] = dense(state[key])
            known[key] = state[key]

    def for_rule(self, index: int, position: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """State as the rule takes it: local shards, without repeated rows."""
        known = self._laid_out[index][position]
        return {
            key: known[compact_key(key)] if compact_key(key) in known else local(value)
            for key, value in state.items()
        }

    def forget_layout(self) -> None:
        """Lay out all entries again before the next step: any may have been replaced."""
        self._laid_out = []

    # ---- state dicts

    def compact(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> dict[Any, Any]:
        """The state of a state dict: without repeated rows, and sharded where ranks are owners."""
        own = [param for group in groups for param in group["params"]]
        self.owners.assign(own)
        result = {}
        for index, entries in state.items():
            param = own[index] if isinstance(index, int) else index
            rule, shape = self.rule_on(param), real_shape(param)
            compact = {k: without_rows(rule, k, v, shape) for k, v in entries.items()}
            owned = "step" in entries and self.owners.has(param)
            result[index] = self.owners.spread(param, compact) if owned else compact
        return result

    def check(self, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
        """Raise ``ValueError`` for a state dict of another rule or other parameters."""
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in saved["param_groups"]]:
            return  # torch reports that
        self._check_identity(saved)
        self.owners.assign([param for group in groups for param in group["params"]])
        for param, entries in _matched(groups, saved):
            if not entries or self.owners.elsewhere(param):
                continue
            rule, shape = self.rule_on(param), real_shape(param)
            found = _shapes(rule, entries, shape)
            expected = _shapes(rule, self.create(param), shape)
            if any(found.get(key) != wanted for key, wanted in expected.items()):
                raise ValueError(
                    f"loaded state dict does not fit the update rule {rule.name!r}: for a "
                    f"parameter of shape {tuple(param.shape)} it holds {found}, and the rule "
                    f"keeps {expected}"
                )

    def _check_identity(self, saved: dict[str, Any]) -> None:
        rule, identity = saved.get("rule"), self._frozen.identity
        if rule is None:  # distributed checkpoints keep state and groups alone
            for group in saved["param_groups"]:
                foreign = ", ".join(sorted(FOREIGN.intersection(group)))
                missing = ", ".join(sorted(OWN_KEYS.difference(group)))
                if missing:
                    which = f"have {foreign}" if foreign else f"lack {missing}"
                    raise ValueError(
                        f"loaded state dict belongs to another optimizer: its groups {which}, and "
                        f"its learning rate would scale learned updates"
                    )
        elif rule != identity:
            raise ValueError(
                f"loaded state dict belongs to the update rule {rule['name']!r} "
                f"({rule['fingerprint']}), and this optimizer runs {identity['name']!r} "
                f"({identity['fingerprint']}): construct it with the same checkpoint"
            )

    def restore(
        self,
        groups: list[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        saved: dict[str, Any],
    ) -> None:
        """Put saved values back in their own dtypes, or in the optimizer's ``state_dtype``.

        torch has cast them to the parameters' dtype. Entries of wrappers are restored unchanged.
        Matrices that are missing or do not fit start anew.
        """
        self.forget_layout()
        for param, entries in _matched(groups, saved):
            if not entries:
                continue
            if self.owners.has(param):
                entries = self.owners.collect(param, entries)
                states[param] = entries = {**self.create(param), **entries}
            rule, state, shape = self.rule_on(param), states[param], real_shape(param)
            whole = {"step", *rule.tensor_state, *rule.matrix_state}
            for key, value in entries.items():
                if key == "step" and not isinstance(value, Tensor):
                    value = torch.tensor(float(value), dtype=torch.float32)
                if not isinstance(value, Tensor):
                    state[key] = copy.deepcopy(value)
                    continue
                compact = without_rows(rule, key, value, shape)
                cast = key in rule.state_keys and key not in whole
                dtype = (self._dtype if cast else None) or value.dtype
                # Counts of the rule's matrices stay on the CPU.
                on_cpu = key in rule.matrix_state and compact.numel() == 1
                own = compact.detach().to("cpu" if on_cpu else param.device, dtype, copy=True)
                state[key] = with_rows(own, shape) if key in whole else own
            if rule.matrix_state:
                keep_fitting_matrices(rule, state, self.create(param), shape)


def _matched(
    groups: list[dict[str, Any]], saved: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Own parameters with their saved state, by position."""
    own = [param for group in groups for param in group["params"]]
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    for param, index in zip(own, ids, strict=False):
        yield param, saved["state"].get(index, {})


def _shapes(
    rule: UpdateRule, entries: Mapping[str, Any], shape: torch.Size
) -> dict[str, tuple[int, ...]]:
    """Shapes of state entries without repeated rows; matrices are not checked."""
    compact = {key: without_rows(rule, key, value, shape) for key, value in entries.items()}
    own = compact.keys() - {*rule.matrix_state}
    return {key: tuple(getattr(compact[key], "shape", ())) for key in sorted(own)}


def compact_key(key: str) -> str:
    """Key of an entry without the repeated rows of its view."""
    return f"{key} without rows"


def with_rows(value: Tensor, shape: torch.Size) -> Tensor:
    """A small entry as a view with the parameter's rows, ``(shape[0], ...)``."""
    if not shape or not value.dim() or value.numel() > MOST_REPEATED:
        return value
    return value.expand(shape[0], *value.shape)


def without_rows(rule: UpdateRule, key: str, value: Any, shape: torch.Size) -> Any:
    """Undo :func:`with_rows`, also after a tool has cut or appended rows.

    Other entries are returned unchanged.
    """
    dims = 1 if key in rule.tensor_state else 2 if key in rule.matrix_state else None
    if dims is None or not isinstance(value, Tensor) or not shape or value.dim() <= dims:
        return value
    return value[0] if len(value) else value.new_zeros(value.shape[1:])


def keep_fitting_matrices(
    rule: UpdateRule, state: dict[str, Any], fresh: State, shape: torch.Size
) -> None:
    """Replace matrices that are missing, zero or misshapen by those of ``fresh``."""
    for key in rule.matrix_state:
        if key not in fresh:
            state.pop(key, None)
            continue
        value = without_rows(rule, key, state.get(key), shape)
        misfit = value is None or value.shape != fresh[key].shape
        if misfit or (has_values(value) and not value.any()):
            state[key] = with_rows(fresh[key], shape) if shape[0] else fresh[key]
