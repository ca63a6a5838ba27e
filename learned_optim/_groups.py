"""Hyperparameters of parameter groups: their checks, and the rule's own weight decay."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from learned_optim._discovery import did_you_mean
from learned_optim._warn import warn, warn_once
from learned_optim.rules import UpdateRule
from learned_optim.rules._step import needs_sync

# Rates up to this are probably meant for another optimizer; preference optimization uses .015.
SUSPICIOUS_LR = 0.004
#: Hyperparameters of other optimizers, which the learned rule replaces or does not need.
FOREIGN = frozenset(
    (
        "alpha", "amsgrad", "beta", "beta1", "beta2", "beta3", "betas", "capturable", "centered",
        "dampening", "decoupled_weight_decay", "differentiable", "eps", "etas", "foreach", "fused",
        "initial_accumulator_value", "lambd", "lr_decay", "momentum", "momentum_decay", "nesterov",
        "rho",
    )
)  # fmt: skip
#: Values that every group of a learned optimizer has.
OWN_KEYS = frozenset({"lr", "weight_decay", "maximize", "total_steps", "warmup"})
#: Group key of the rule's own weight decay; ``None`` where the user set another.
OWN_DECAY = "default_weight_decay"


# ---- the constructor's arguments


def check_rule(rule: object) -> None:
    """Raise ``TypeError`` unless the argument is a rule or may name one."""
    if not isinstance(rule, (str, os.PathLike, UpdateRule)):
        raise TypeError(
            f"the second argument of LearnedOptimizer is the update rule, got {rule!r}. If it "
            f"was Adam's learning rate, leave it out: LearnedOptimizer(params) needs none "
            f"(lr=1.0 is a multiplier of the learned update)"
        )


def check_state_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` unless state can have this dtype."""
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be a floating point dtype, got {dtype}: one of "
            f"torch.float32, torch.float64 and torch.bfloat16 (float16's range is too short "
            f"for running moments)"
        )


def check_unknown(unknown: Collection[str], known: Iterable[str]) -> None:
    """Raise ``TypeError`` for keyword arguments that the constructor does not have."""
    foreign = sorted(FOREIGN.intersection(unknown))
    if foreign:
        raise TypeError(
            f"LearnedOptimizer takes no {', '.join(foreign)}: leave out "
            f"{'it' if len(foreign) == 1 else 'them'}. The learned update rule has momenta and "
            f"scaling of its own, and steps all tensors at once"
        )
    for name in unknown:
        raise TypeError(f"LearnedOptimizer has no argument {name!r}{did_you_mean(name, known)}")


def warn_of_foreign_keys(group: dict[str, Any], warned: set[str]) -> None:
    """Warn once of another optimizer's hyperparameters in a group."""
    foreign = sorted(FOREIGN.intersection(group))
    if foreign:
        warn_once(
            warned,
            "foreign",
            f"{', '.join(foreign)} in a parameter group of LearnedOptimizer has no effect: the "
            f"learned update rule has momenta and scaling of its own. Leave out what belongs to "
            f"another optimizer",
        )


def warn_of_small_lr(groups: list[dict[str, Any]]) -> None:
    """Warn of learning rates that look like another optimizer's."""
    small = [float(g["lr"]) for g in groups if 0.0 < float(g["lr"]) <= SUSPICIOUS_LR]
    if small:
        warn(
            f"LearnedOptimizer got lr={small[0]:g}, which scales every learned update "
            f"by that much and trains about {1 / small[0]:.0f} times too slowly. lr "
            f"multiplies the update; learning rates of other optimizers do not carry over. "
            f"Leave it out, or pass lr=1.0"
        )


# ---- values of groups


def whole_steps(total: Any) -> int | None:
    """``total_steps`` as an integer; ``None`` if it is unknown.

    Args:
        total: a whole number of any type. Trainers write ``inf`` or -1 for an unknown length.

    Raises:
        ValueError: anything else.
    """
    number = _number(total)
    if total is None or number in (math.inf, -1.0):
        return None
    if not number.is_integer() or number < 1:
        raise ValueError(
            f"total_steps is the number of optimizer steps of the whole run, a positive whole "
            f"number, got {total!r}: pass epochs * len(loader), divided by the steps over which "
            f"gradients are accumulated, or None if it is unknown"
        )
    return int(number)


def _number(value: Any) -> float:
    """A number of any type as a float; NaN for anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def rate_of(lr: float | Tensor, index: int | None = None) -> float | None:
    """The learning rate; ``None`` if reading it would synchronize a device.

    Args:
        lr: of a group.
        index: of the group in a step; ``None`` before the group has stepped.

    Raises:
        ValueError: it is no learning rate; the message says what may have set it.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            f"Tensor lr must be 1-element, got one of shape {tuple(lr.shape)}: give each group of "
            f"parameters a learning rate of its own"
        )
    if needs_sync(lr):
        return None
    rate = float(lr)
    if 0.0 <= rate < math.inf:
        return rate
    if index is None:
        raise ValueError(
            f"Invalid learning rate: {rate}. It multiplies learned updates, and must be finite and "
            f"0 or more: leave it out, or pass lr=1.0"
        )
    raise ValueError(
        f"lr of parameter group {index} is {rate} in this step: a learning rate scheduler, or code "
        f"that sets param_groups[{index}]['lr'], has made it so. It must be finite and 0 or more"
    )


def settle(rule: UpdateRule, group: dict[str, Any]) -> None:
    """Check the values of a group, and set a missing weight decay.

    That is the rule's own, and follows a changed length of the run until another one is set.

    Raises:
        ValueError: a value out of range.
    """
    group["total_steps"] = whole_steps(group["total_steps"])
    own = group.get(OWN_DECAY)
    group[OWN_DECAY] = None
    if group["weight_decay"] is None or group["weight_decay"] == own:
        own = rule.default_weight_decay(group["total_steps"])
        group["weight_decay"] = group[OWN_DECAY] = own
    rate_of(group["lr"])
    weight_decay, warmup = group["weight_decay"], _number(group["warmup"])
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(
            f"Invalid weight_decay value: {weight_decay}. It must be finite and 0 or more: 0.0 is "
            f"none, and 0.01 AdamW's default"
        )
    if not warmup.is_integer() or warmup < 0:
        raise ValueError(
            f"warmup is a number of steps, a whole number of 0 or more, got {group['warmup']!r}: "
            f"pass 0 for none, or leave it out for the rule's own"
        )
    group["warmup"] = int(warmup)
