"""The network inside a rule: its inputs and units by name, their means, and rules without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from learned_optim import LearnedOptimizer
from learned_optim.explain._runs import Trial
from learned_optim.rules import State, UpdateRule
from learned_optim.rules.horizon import HorizonRule

_TENSOR_FEATURES = (
    "relative scale", "fan-in", "is a vector", "age", "is young", "fast share", "slow share",
    "gradient share",
)  # fmt: skip
#: Inputs of the network of ``horizon``, in its order.
INPUT_NAMES = (
    "scale", "fan_in", "size", "is_vector", "age", "is_young", "known", "progress", "left",
    "length", "fast_share", "slow_share", "fast_signal", "slow_signal", "inequality",
    "agrees_fast", "agrees_fast_long", "agrees_slow", "live", "moved", "gradient_change", "trust",
)  # fmt: skip
_NAMES = {
    "equivariant": (
        "fast size", "slow size", "gradient size", "fast x slow", "gradient x fast",
        "relative gradient", "relative parameter", *_TENSOR_FEATURES,
    ),
    "lstm": ("log gradient", "sign"),
}  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """What a rule's network read and answered over runs.

    Attributes:
        inputs: ``(rows, f)``.
        units: what the readout reads, ``(rows, u)``.
        outputs: before they are bounded, ``(rows, o)``; empty for other rules than ``horizon``.
    """

    inputs: Tensor
    units: Tensor
    outputs: Tensor


def has_network(rule: UpdateRule) -> bool:
    """Whether this module knows the rule's kind of network."""
    return hasattr(rule, "readout") and (hasattr(rule, "hidden") or hasattr(rule, "lstm"))


def input_names(rule: UpdateRule) -> tuple[str, ...]:
    """Names of the network's inputs; of inputs that nobody has named, their numbers."""
    count = _first_weight(rule).shape[1]
    names = INPUT_NAMES if isinstance(rule, HorizonRule) else _NAMES.get(rule.name, ())
    known = tuple(name.replace("_", " ") for name in names[:count])
    return known + tuple(f"input {i}" for i in range(len(known), count))


def _first_weight(rule: Any) -> Tensor:
    return rule.hidden.weight if hasattr(rule, "hidden") else rule.lstm.weight_ih_l0


@torch.no_grad()
def _observe(rule: Any, features: Tensor, state: State) -> Recorded:
    """One step's inputs and units, from the arguments of ``respond``; features ``(r, f)``."""
    if isinstance(rule, HorizonRule):
        inputs = rule.inputs(features, state["stats"])
        return Recorded(inputs, torch.tanh(rule.hidden(inputs)), rule.answers(inputs))
    own = {key: value.clone() for key, value in state.items()}
    out, _ = rule.lstm.sequence(features.unsqueeze(0), own)
    return Recorded(features, out[0], features.new_zeros(len(features), 0))


def recording(optimizer: LearnedOptimizer, sink: Callable[[Recorded], None]) -> None:
    """Show ``sink`` what the network of an optimizer's own rule reads, at every step from now on.

    The optimizer must have been given a rule, not a name: rules of names are shared.
    """
    rule = optimizer._frozen.rule
    inner = rule.respond_

    def respond_(features: Tensor, state: State) -> Tensor:
        sink(_observe(rule, features, state))
        return inner(features, state)

    # The compiled kernel does not call respond_.
    rule.step_ = MethodType(UpdateRule.step_, rule)  # type: ignore[method-assign]
    rule.respond_ = respond_  # type: ignore[method-assign]


def record(rule: UpdateRule, trials: Sequence[Trial], rows: int = 50_000) -> Recorded:
    """What the network reads and answers over runs, about ``rows`` rows of it.

    Every run has as many of them as another.
    """
    seen: list[Recorded] = []
    generator = torch.Generator().manual_seed(0)
    for trial in trials:
        share = rows / (len(trials) * trial.steps)

        def keep(one: Recorded, share: float = share) -> None:
            draws = torch.rand(len(one.inputs), generator=generator)
            chosen = draws < share / len(one.inputs)
            seen.append(Recorded(one.inputs[chosen], one.units[chosen], one.outputs[chosen]))

        trial.train(rule, lambda optimizer: recording(optimizer, keep))
    return Recorded(
        *(torch.cat([getattr(one, key) for one in seen]) for key in ("inputs", "units", "outputs"))
    )


@torch.no_grad()
def without_input(rule: UpdateRule, index: int, mean: float) -> UpdateRule:
    """The rule with one input held at its mean: the same as moving its weights into the biases."""
    own: Any = copy.deepcopy(rule)
    weight = _first_weight(own)
    bias = own.hidden.bias if hasattr(own, "hidden") else own.lstm.bias_ih_l0
    bias += weight[:, index] * mean
    weight[:, index] = 0
    direct = getattr(own, "direct", None)
    if direct is not None:
        column = index - (weight.shape[1] - direct.weight.shape[1])  # of whole tensors alone
        if column >= 0:
            own.readout.bias += direct.weight[:, column] * mean
            direct.weight[:, column] = 0
    return own


@torch.no_grad()
def without_unit(rule: UpdateRule, index: int, mean: float) -> UpdateRule:
    """The rule whose readout sees the mean of one unit of the last layer."""
    own: Any = copy.deepcopy(rule)
    own.readout.bias += own.readout.weight[:, index] * mean
    own.readout.weight[:, index] = 0
    return own
