"""Numbers of one optimizer step by tensor, for :meth:`LearnedOptimizer.diagnostics`.

Step hooks compute them, so an optimizer without hooks pays nothing. Before the step they copy
parameters and the network's state. After it they run the pure form of the rule on the new moments,
which gives the gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim._param_states import ParamStates, without_rows
from learned_optim._views import local, real_shape, shard_groups
from learned_optim.kernels.constants import DECAY_UNIT, FAST_BETA, SQUARE_BETA, TINY
from learned_optim.rules import Segments, State, StepContext, UpdateRule
from learned_optim.rules import _basis as basis
from learned_optim.rules import _history as history
from learned_optim.rules._base import decayed
from learned_optim.rules._features import bias_correction
from learned_optim.rules._step import as_rows, sanitize_grad
from learned_optim.rules.horizon import HorizonRule

#: Names of directions by rule; directions of other rules are numbered.
DIRECTION_NAMES = {
    "horizon": ("fast", "slow", "gradient", "cautious"),
    "equivariant": ("fast", "slow", "gradient"),
    "lstm": ("update",),
}


class Recorder:
    """Step hooks of one optimizer.

    Attributes:
        found: numbers of the last step by tensor; ``None`` before the first one.
    """

    def __init__(self, optimizer: Optimizer, states: ParamStates) -> None:
        self._states = states
        self.found: dict[str, dict[str, float]] | None = None
        # By parameter: number of earlier updates, its copy, and copies of per-tensor entries and of
        # the network's.
        self._before: dict[Tensor, tuple[float, Tensor, State]] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._copy),
            optimizer.register_step_post_hook(self._measure),
        )

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _copy(self, optimizer: Any, *_: Any) -> None:
        self._before = {}
        owners = self._states.owners
        for group in optimizer.param_groups:
            owners.assign(group["params"])
            for param in group["params"]:
                rule, state = self._states.rule_on(param), optimizer.state.get(param, {})
                own = owners.seen(param, param).detach().clone()
                if owners.elsewhere(param):
                    continue
                entries = state if "step" in state else rule.init_state(own)
                copied = {
                    key: _entry(rule, key, entries, param).clone()
                    for key in {*rule.network_state, *rule.tensor_state}
                }
                self._before[param] = float(state.get("step", 0.0)), own, copied

    @torch.no_grad()
    def _measure(self, optimizer: Any, *_: Any) -> None:
        self.found = {}
        owners = self._states.owners
        for number, group in enumerate(optimizer.param_groups):
            params = group["params"]
            names = group.get("param_names") or [f"{number}/{i}" for i in range(len(params))]
            for name, param in zip(names, params, strict=True):
                if param.grad is None:
                    continue
                grad, now = owners.seen(param, param.grad), owners.seen(param, param)
                before = self._before.get(param)
                state = optimizer.state.get(param, {})
                # The count of a frozen tensor stays.
                if before and state.get("step", 0.0) == before[0] + 1:
                    rule = self._states.rule_on(param)
                    groups = () if owners.has(param) else shard_groups(param)
                    self.found[name] = _tensor_numbers(
                        rule, state, group, param, before, grad, now, groups
                    )
        self._before = {}


def _entry(rule: UpdateRule, key: str, state: Mapping[str, Tensor], param: Tensor) -> Tensor:
    """A state entry as the pure form takes it: ``(n, k)`` or ``(1, k)``."""
    value = without_rows(rule, key, local(state[key]), real_shape(param)).to(rule.dtype)
    return value.reshape(1, -1) if key in rule.tensor_state else as_rows(value)


def _rotated(rule: UpdateRule, state: Mapping[str, Tensor], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient ``(n,)`` in the eigenbasis that the step left in ``state``."""
    shape = real_shape(param)
    rows, cols = (
        without_rows(rule, key, state[key], shape) if key in state else None
        for key in ("row_basis", "col_basis")
    )
    matrix = grad.view(basis.matrix_shape(shape))
    return basis.rotate_grad(matrix, rows, cols).reshape(-1)


def _tensor_numbers(
    rule: UpdateRule,
    state: Mapping[str, Tensor],
    group: dict[str, Any],
    param: Tensor,
    before: tuple[float, Tensor, State],
    raw: Tensor,
    now: Tensor,
    groups: tuple[Any, ...],
) -> dict[str, float]:
    step, start, copied = before
    grad = sanitize_grad(raw.reshape(-1), rule.dtype, group["maximize"])
    old = start.reshape(-1).to(rule.dtype)
    # In the parameter's own dtype first, which may be wider than the rule's.
    moved = (now - start).reshape(-1).to(rule.dtype)
    segments = Segments(
        [real_shape(param)], dtype=rule.dtype, device=grad.device, sizes=[len(grad)],
        shard_groups=groups,
    )  # fmt: skip
    squares = segments.mean(torch.stack((grad**2, old**2, moved**2, -grad * moved)))[:, 0]
    grad_square, square, moved_square, along = squares.tolist()
    warmup = group["warmup"]
    numbers = {
        "step": step,
        "grad_rms": grad_square**0.5,
        "param_rms": square**0.5,
        "step_rms": moved_square**0.5,
        "step_ratio": (moved_square / square) ** 0.5 if square else 0.0,
        "effective_lr": along / grad_square if grad_square else 0.0,
        "cosine": along / (grad_square * moved_square) ** 0.5 if along else 0.0,
        "schedule": min(1.0, (step + 1) / warmup) if warmup else 1.0,
    }
    if type(rule).forward is not UpdateRule.forward:
        return numbers
    entries = {key: _entry(rule, key, state, param) for key in rule.state_keys}
    count = torch.full((1,), step, dtype=rule.dtype, device=grad.device)
    rotated = None
    if "basis_age" in state:
        rotated, grad = torch.ones_like(count), _rotated(rule, state, grad, param)
    context = StepContext(count, None, group["total_steps"], rotated)
    numbers.update(_signal_share(rule, entries, context, segments))
    if not rule.needs_loss and rule.rows != "none":
        own = {"step": count[0], **{key: copied[key][0] for key in rule.tensor_state}}
        decay = rule.scheduled_decay(group["weight_decay"], [own], context)
        (shrunk,) = decayed(rule, [old], [grad], DECAY_UNIT * float(group["lr"]) * decay)
        entries.update({key: copied[key] for key in rule.network_state})
        numbers.update(_gains(rule, grad, entries, shrunk, segments, context, numbers))
    return numbers


def _gains(
    rule: UpdateRule,
    grad: Tensor,
    state: State,
    param: Tensor,
    segments: Segments,
    context: StepContext,
    numbers: dict[str, float],
) -> dict[str, float]:
    """Gains and parts of the directions, and the rule's schedule."""
    features, directions = rule.features(grad, state, param, segments, context)
    assert features is not None
    gains, _ = rule.respond(features.unsqueeze(0), {key: state[key] for key in rule.network_state})
    parts = segments.mean(((directions * gains[0]) ** 2).t())[:, 0].sqrt()
    means = segments.mean(gains[0].expand_as(directions).t())[:, 0]
    found = {}
    if isinstance(rule, HorizonRule):
        found["schedule"] = numbers["schedule"] * float(features[0, history.SCHEDULE])
        found["step_confidence"] = math.exp(float(state["stats"][0, history.CONFIDENCE]))
    names = DIRECTION_NAMES.get(rule.name, ())
    if len(names) != len(parts):
        names = tuple(f"direction_{i}" for i in range(len(parts)))
    for name, gain, part in zip(names, means.tolist(), parts.tolist(), strict=True):
        found[f"gain/{name}"] = -gain
        found[f"part/{name}"] = part
    return found


def _signal_share(
    rule: UpdateRule, state: State, context: StepContext, segments: Segments
) -> dict[str, float]:
    """Mean square of the bias-corrected fast momentum over that of the gradient."""
    cfg = rule.config
    if {"fast", "square"} <= state.keys():
        first, second, betas = state["fast"], state["square"], (FAST_BETA, SQUARE_BETA)
    elif "moments" in state and hasattr(cfg, "fast_beta"):
        columns = state["moments"]
        first, second, betas = columns[:, :1], columns[:, 2:], (cfg.fast_beta, cfg.square_beta)
    elif {"first_moment", "second_moment"} <= state.keys():
        first, second = state["first_moment"], state["second_moment"]
        betas = cfg.beta1, cfg.beta2
    else:
        return {}
    means = segments.mean(torch.cat((first**2, second), 1).t())[:, 0]
    corrections = bias_correction(context.step + 1, *betas)[:, 0]
    share = (means[0] / corrections[0] ** 2) / (means[1] / corrections[1] + TINY**2)
    return {"signal_share": float(share)}
