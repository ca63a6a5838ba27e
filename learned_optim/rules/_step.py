"""The in-place step that every rule inherits: the parts of the pure form, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learned_optim.rules import _base
from learned_optim.rules._basis import LARGEST_GRAD
from learned_optim.rules._pieces import BLOCK, MOST_PACKED, Piece, pieces_of
from learned_optim.rules._segments import Segments, is_plain_eager

if TYPE_CHECKING:
    from learned_optim.rules._base import State, UpdateRule

# Weight decay is in AdamW's units: at lr = 1 it shrinks as AdamW does at its usual lr of 1e-3.
DECAY_UNIT = 1e-3


def reference_step_(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    warmup: int,
    loss: Tensor | None,
    total_steps: float | None,
    shapes: Sequence[torch.Size] | None,
    shard_groups: tuple[Any, ...],
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """See :meth:`UpdateRule.step_`; tensors with an entry in ``updates`` only decay."""
    if not params:
        return
    targets = list(params)
    for index, update in enumerate(updates or ()):
        if update is not None:
            targets[index] = update.zero_()
    dtype, device = rule.dtype, params[0].device
    segments = Segments.of(
        tuple(param.shape for param in params) if shapes is None else tuple(shapes),
        dtype,
        device,
        tuple(param.numel() for param in params),
        shard_groups,
    )
    old_states: list[State] = []
    if needs_sync(lr):  # whether lr is zero, and state must stay, is known on the device alone
        own = ("step", *rule.state_keys)
        old_states = [{key: state[key].clone() for key in own} for state in states]
    if isinstance(lr, Tensor):
        lr = lr.to(device).reshape(())
    steps = [state["step"] for state in states]
    step = torch.stack(steps).to(dtype)
    rotated = None
    if updates is not None:
        rotated = torch.tensor([float(u is not None) for u in updates], dtype=dtype, device=device)
    context = _base.StepContext(step, loss if rule.needs_loss else None, total_steps, rotated)
    if weight_decay != 0:
        decay = DECAY_UNIT * lr * rule.scheduled_decay(weight_decay, states, context)
        for param, shrunk in zip(params, decayed(rule, params, grads, decay), strict=True):
            param.copy_(shrunk)
    factor = warmup_factor(step, warmup)
    by_parts = type(rule).forward is _base.UpdateRule.forward
    most_packed = MOST_PACKED if rule.rows == "coordinates" else BLOCK
    whole = not by_parts and not rule.coordinatewise
    pieces = pieces_of(params, segments, most_packed, whole)
    if by_parts:
        found = _updates_by_parts(rule, pieces, params, grads, states, maximize, segments, context)
    else:
        found = _updates_by_forward(rule, pieces, params, grads, states, maximize, context)
    for piece, update in found:
        if factor is not None:
            update = update * piece.segments.expand(factor[piece.tensors])
        piece.add_(targets, update, lr)
    torch._foreach_add_(steps, 1)
    if old_states and isinstance(lr, Tensor):
        for state, old in zip(states, old_states, strict=True):
            for key, value in old.items():
                state[key].copy_(torch.where(lr != 0, state[key], value))


def decayed(
    rule: UpdateRule, params: Sequence[Tensor], grads: Sequence[Tensor], decay: float | Tensor
) -> Iterator[Tensor]:
    """Parameters after weight decay: of all by one number, or of each by its own, ``(m,)``."""
    each = decay.expand(len(params)) if isinstance(decay, Tensor) else [decay] * len(params)
    for param, grad, own in zip(params, grads, each, strict=True):
        # On a GPU a factor of no dimensions would be rounded to half precision first.
        kind = own.dtype if isinstance(own, Tensor) else torch.float32
        wide = param.to(torch.promote_types(param.dtype, kind))
        factor = 1.0 - (own.to(wide.dtype) if isinstance(own, Tensor) else own)
        shrunk = wide * factor
        if rule.decays_live:
            shrunk = torch.where(sanitize_grad(grad, rule.dtype, False) != 0, shrunk, wide)
        yield shrunk


def _updates_by_parts(
    rule: UpdateRule,
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    maximize: bool,
    segments: Segments,
    context: _base.StepContext,
) -> Iterator[tuple[Piece, Tensor]]:
    """Two passes: moments and means over whole tensors; then features, gains and updates."""
    dtype = rule.dtype
    per_tensor = set(rule.tensor_state)
    moments = [key for key in rule.state_keys if key not in rule.network_state]
    seen: dict[int, tuple[Tensor, State, Tensor]] = {}  # of the only piece, kept for pass two
    sums: list[Tensor] = []

    def load(piece: Piece) -> tuple[Tensor, State, Tensor]:
        grad = sanitize_grad(piece.pack(grads), dtype, maximize)
        state = {key: piece.pack_rows(states, key, dtype) for key in moments}
        return grad, state, piece.pack(params).to(dtype)

    def observe_(piece: Piece) -> tuple[Tensor, State, Tensor]:
        grad, state, param = load(piece)
        new = rule.moments(grad, state)
        for key, value in new.items():
            piece.unpack_rows_(states, key, value)
        return grad, {**state, **new}, param

    probe = type(rule).products is not _base.UpdateRule.products
    for index, piece in enumerate(pieces if probe else ()):
        grad, state, param = observe_(piece)
        own = context.of(piece.tensors)
        part = piece.segments.sums(rule.products(grad, state, param, piece.segments, own))
        if sums and piece.first == pieces[index - 1].first:  # the tensor's next block
            sums[-1] = sums[-1] + part
        else:
            sums.append(part)
        if len(pieces) == 1:
            seen[0] = grad, state, param
    means = segments.mean_from_sums(torch.cat(sums, 1)) if sums else segments.columns[:0]
    features, stats = rule.tensor_features(means, segments, context)
    gains = None
    if rule.rows == "tensors" and features is not None:
        gains = _respond_to_tensors_(rule, features, states)
    for index, piece in enumerate(pieces):
        if not probe:
            grad, state, param = observe_(piece)
        else:
            grad, state, param = seen.pop(index) if index in seen else load(piece)
        own_stats = None if stats is None else piece.segments.expand(stats[:, piece.tensors])
        rows, directions = rule.coordinate_features(grad, state, param, own_stats)
        if rule.rows == "coordinates" and rows is not None:
            network = {
                key: piece.pack_rows(states, key, dtype)
                for key in rule.network_state
                if key not in per_tensor
            }
            answer: Tensor | None = rule.respond_(rows, network)
            for key, value in network.items():
                piece.unpack_rows_(states, key, value)
        else:
            answer = None if gains is None else gains[piece.tensors]
        yield piece, rule.mix(directions, answer, piece.segments)


def _respond_to_tensors_(rule: UpdateRule, features: Tensor, states: Sequence[State]) -> Tensor:
    """Gains ``(m, d)`` of rules that have them per tensor, in place in the network's state."""
    own = {key: [state[key] for state in states] for key in rule.network_state}
    network = {key: torch.stack(values).to(features.dtype) for key, values in own.items()}
    gains = rule.respond_(features, network)
    for key, value in network.items():
        torch._foreach_copy_(own[key], list(value.unbind()))
    return gains


def _updates_by_forward(
    rule: UpdateRule,
    pieces: Sequence[Piece],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    maximize: bool,
    context: _base.StepContext,
) -> Iterator[tuple[Piece, Tensor]]:
    """For rules that define :meth:`forward` itself."""
    dtype, keys = rule.dtype, rule.state_keys
    for piece in pieces:
        state = {}
        for key in keys:
            if key in rule.tensor_state:
                state[key] = torch.stack([s[key] for s in states[piece.tensors]]).to(dtype)
            else:
                state[key] = piece.pack_rows(states, key, dtype)
        own = context.of(piece.tensors)
        grad = sanitize_grad(piece.pack(grads), dtype, maximize)
        update, new = rule(grad, state, piece.pack(params).to(dtype), piece.segments, own)
        for key, value in new.items():
            if key in rule.tensor_state:
                targets = [s[key] for s in states[piece.tensors]]
                torch._foreach_copy_(targets, list(value.unbind()))
            else:
                piece.unpack_rows_(states, key, value)
        yield piece, update


def sanitize_grad(grad: Tensor, dtype: torch.dtype, maximize: bool = False) -> Tensor:
    """A new tensor of ``dtype``: NaN and infinity as zero, finite entries cut off at 2^48."""
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
    grad.clamp_(-LARGEST_GRAD, LARGEST_GRAD)
    return grad.neg_() if maximize else grad


def warmup_factor(step: Tensor, warmup: int) -> Tensor | None:
    """``min(1, (step + 1) / warmup)``, shape ``(m,)``; ``None`` if known to be 1 for free."""
    if not warmup:
        return None
    known = step.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain_eager()
    if known and float(step.min()) + 1 >= warmup:
        return None
    return ((step + 1) / warmup).clamp(max=1.0)


def needs_sync(lr: float | Tensor) -> bool:
    """True if reading ``lr`` would synchronize the device or end a compiled graph."""
    if not isinstance(lr, Tensor):
        return False
    return lr.device.type != "cpu" or torch.compiler.is_compiling()
