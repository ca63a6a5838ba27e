"""Hyperparameters of parameter groups: their checks, and warnings about how they go together."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from learned_optim.rules import UpdateRule
from learned_optim.rules._step import needs_sync

# A learning rate from Adam's world: kept by keyword, it would scale every learned update by it.
SUSPICIOUS_LR = 0.01

#: Values of groups that were saved before the hyperparameter existed.
ABSENT = {"maximize": False, "weight_decay": 0.0, "total_steps": None, "warmup": 0}


def check_rule(rule: object) -> None:
    """Raise ``TypeError`` for what stands in the rule's place but is none."""
    if not isinstance(rule, (str, os.PathLike, UpdateRule)):
        raise TypeError(
            f"the second argument of LearnedOptimizer is the update rule, got {rule!r}. If it "
            f"was Adam's learning rate, leave it out: LearnedOptimizer(params) needs none "
            f"(lr=1.0 is a multiplier of the learned update)"
        )


def check_state_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` for a dtype that state cannot have."""
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be a floating point dtype, got {dtype}: one of "
            f"torch.float32, torch.float64 and torch.bfloat16 (float16's range is too short "
            f"for running moments)"
        )


def check_total_steps(total: Any) -> None:
    """Raise ``ValueError`` for what is no length of a run."""
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise ValueError(
            f"total_steps is the number of optimizer steps of the whole run, a positive integer, "
            f"got {total!r}: pass epochs * len(loader), divided by the steps over which gradients "
            f"are accumulated, or None if it is unknown"
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for hyperparameters out of range."""
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not math.isfinite(lr) or lr < 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not math.isfinite(weight_decay) or weight_decay < 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    check_total_steps(group["total_steps"])
    warmup = group["warmup"]
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
        raise ValueError(
            f"warmup is a number of steps, an integer of 0 or more, got {warmup!r}: 0 is none, "
            f"and None the rule's own"
        )


def warn_of_small_lr(groups: list[dict[str, Any]]) -> None:
    """Warn of learning rates that look like another optimizer's."""
    small = [float(g["lr"]) for g in groups if 0.0 < float(g["lr"]) <= SUSPICIOUS_LR]
    if small:
        warnings.warn(
            f"LearnedOptimizer got lr={small[0]:g}, which scales every learned update "
            f"by that much and trains about {1 / small[0]:.0f} times too slowly. lr "
            f"multiplies the update; learning rates of other optimizers do not carry over. "
            f"Leave it out, or pass lr=1.0",
            stacklevel=3,
        )


class HorizonMonitor:
    """Warns, once each, of what does not go with ``total_steps``."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._steps: int | None = None
        self._lrs: list[float] | None = None

    def _warn(self, kind: str, message: str, stacklevel: int) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=stacklevel + 1)

    def warn_if_ignored(self, rule: UpdateRule, group: dict[str, Any]) -> None:
        """Warn if the rule does not read the length of the run that it is told."""
        if group["total_steps"] is not None and not rule.reads_horizon:
            self._warn(
                "ignored",
                f"total_steps={group['total_steps']} has no effect: the update rule {rule.name!r} "
                f"does not know the length of a run. Leave it out, or choose a checkpoint of a "
                f"rule that does",
                stacklevel=5,
            )

    def watch(self, groups: list[dict[str, Any]], state: Any, rule: UpdateRule) -> None:
        """Look at a step that was taken; costs nothing unless the rule anneals."""
        if not rule.reads_horizon:
            return
        horizons = [group["total_steps"] for group in groups if group["total_steps"] is not None]
        if not horizons:
            return
        lrs = [group["lr"] for group in groups if isinstance(group["lr"], (int, float))]
        if not any(lrs):
            return
        # Groups that were added meanwhile have no earlier rate.
        changes = zip(self._lrs or (), lrs, strict=False)
        for before, after in (pair for pair in changes if pair[0] != pair[1]):
            self._warn(
                "schedule",
                f"lr went from {before:g} to {after:g} while total_steps is given: the rule "
                f"{rule.name!r} anneals by itself, and a scheduler on top anneals twice. Leave "
                f"out one of them",
                stacklevel=4,
            )
        self._lrs = lrs
        if self._steps is None:
            steps = [s["step"] for s in state.values() if "step" in s]
            if not steps or any(needs_read(step) for step in steps):
                return
            self._steps = max(int(step) for step in steps)  # once: synchronizes a device
        else:
            self._steps += 1
        if self._steps > min(horizons):
            self._warn(
                "past",
                f"step {self._steps} is past total_steps={min(horizons)}: the rule {rule.name!r} "
                f"holds the last rate. Construct the optimizer with the length of the whole run",
                stacklevel=4,
            )


def needs_read(step: Tensor) -> bool:
    """True for step counts without a value: on the meta device or fake."""
    return step.device.type == "meta" or hasattr(step, "fake_mode")


def seen_loss(rule: UpdateRule, loss: float | Tensor | None, device: torch.device) -> Tensor:
    """The loss as a rule reads it: finite, on its device and in its dtype."""
    seen = torch.as_tensor(loss, dtype=rule.dtype, device=device)
    return torch.nan_to_num(seen, nan=0.0, posinf=0.0, neginf=0.0)


def is_zero_without_sync(lr: float | Tensor) -> bool:
    """True if ``lr`` is known to be zero without asking a device."""
    return not needs_sync(lr) and float(lr) == 0.0
