"""Meta-gradients: how the loss over an unroll depends on the update rule's weights.

All estimators share one signature, ``estimator(rule, optimizees, steps, options) ->
MetaGradient``, and leave ``optimizees`` where the unroll ended, detached. The meta-loss of an
unroll is the sum over its steps of the loss at the parameters *before* each update (thesis eq. 3.4
with w_t = 1), averaged over the optimizees.

``autograd``   truncated backpropagation through time with d grad / d phi = 0: the thesis's.
``replay``     the same gradients from a rollout without a graph: see :func:`replay`.
``full``       second derivatives kept: exact for the unroll; the reference for the others.
``es``         antithetic evolution strategies on the unroll, no derivatives: see :func:`es`.
``pes``        the same without the bias of truncation: see :func:`pes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.meta._estimator import (
    Estimator,
    EstimatorOptions,
    MetaGradient,
    Sampling,
)
from learned_optim.meta.antithetic import es, pes
from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import State, UpdateRule

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "EstimatorOptions",
    "MetaGradient",
    "Sampling",
    "autograd",
    "es",
    "full",
    "pes",
    "replay",
]

# Coordinates per slice of a replay: recurrent activations of 1,000 rows and 20 steps stay near the
# cache, which halves the backward pass's time per coordinate against one slice of 4,000.
REPLAY_ROWS = 1000


def _backpropagate(
    rule: UpdateRule, optimizees: Optimizees, steps: int, first_order: bool
) -> MetaGradient:
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            batch, packed = optimizees.next_batch(), optimizees.packed
            if first_order:
                _, grad = optimizees.losses_and_grad(packed, batch)
                loss, seen = optimizees.losses(packed, batch), packed.detach()
            else:
                if not packed.requires_grad:
                    packed.requires_grad_()
                loss, grad = optimizees.losses_and_grad(packed, batch, create_graph=True)
                seen = packed
            losses.append(loss)
            update, state = optimizees.forward(rule, grad, seen, loss)
            optimizees.packed = packed + update
            optimizees.state = {**optimizees.state, **state}
            optimizees.step += 1
        stacked = torch.stack(losses)  # (steps, B)
        weights = list(rule.parameters())
        meta = torch.autograd.grad(stacked.sum(0).mean(), weights, allow_unused=True)
    optimizees.packed = optimizees.packed.detach()
    optimizees.state = {key: value.detach() for key, value in optimizees.state.items()}
    return MetaGradient(stacked.detach(), _zeros_for_none(meta, weights))


def _zeros_for_none(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of ``weights``, zero for those that had no part in the unroll."""
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]


def autograd(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """Truncated backpropagation through the unroll with d grad / d phi = 0 (thesis section 3.2)."""
    return _backpropagate(rule, optimizees, steps, first_order=True)


def full(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """Backpropagation through the unroll with second derivatives: nothing is dropped."""
    return _backpropagate(rule, optimizees, steps, first_order=False)


def replay(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """The gradients of :func:`autograd`, at a fraction of its memory and time.

    With d grad / d phi = 0 the parameters enter the meta-loss only as sums of updates, so that

        dL / dphi = sum_t sum_i A_{t,i} d u_{t,i} / d phi,   A_t = sum_{s > t} grad f(theta_s),

    An update is a sum of directions D, which do not depend on the weights, times gains, so that

        dL / dgain_{t,r,d} = sum over coordinates i of row r of A_{t,i} D_{t,i,d}.

    The optimizees are rolled out without any graph. Then the recorded features are fed through
    the network once more and ``sum(gains * dL/dgains)`` is back-propagated: for all rows, or, where
    rows are coordinates, for some that are drawn at random.

    Raises:
        TypeError: the rule does not split into observation and response.
    """
    if rule.rows == "none":
        raise TypeError(
            f"estimator 'replay' needs a rule that splits into observation and response, and "
            f"{type(rule).__name__} has no rows: use estimator='autograd'"
        )
    by_tensor = rule.rows == "tensors"
    segments = optimizees.segments
    if by_tensor:
        rows = torch.arange(len(segments))
        scale = torch.ones(len(segments), dtype=torch.float64)
    else:
        rows, scale = _sample_coordinates(segments.sizes, options)
    start = {key: optimizees.state[key][rows] for key in rule.network_state}
    record = [optimizees.advance_recorded(rule) for _ in range(steps)]
    losses = torch.stack([step.losses for step in record])
    grads = [step.grad for step in record]

    future_grads = torch.zeros_like(optimizees.packed if by_tensor else grads[0][rows])
    grad_gains = []  # dL / dgains, (r, d) per step, last first
    for t in reversed(range(steps)):
        directions = record[t].directions
        if by_tensor:
            products = [(direction, future_grads) for direction in directions.t()]
            grad_gains.append(segments.sums(products).t())
            future_grads = future_grads + grads[t]
        else:
            grad_gains.append(future_grads.unsqueeze(1) * directions[rows])
            future_grads = future_grads + grads[t][rows]
    slopes = torch.stack(grad_gains[::-1])  # (T, r, d)
    slopes = slopes * (scale / len(optimizees)).to(slopes.dtype).unsqueeze(1)
    features = torch.stack([step.features if by_tensor else step.features[rows] for step in record])
    meta = _backpropagate_gains(rule, features, slopes, start)
    return MetaGradient(losses, meta)


def _backpropagate_gains(
    rule: UpdateRule, features: Tensor, grad_gains: Tensor, start: State
) -> list[Tensor]:
    """The gradient of ``sum(gains * grad_gains)``, slice by slice of rows.

    Args:
        rule: whose network is run over the features, ``(T, r, f)``.
        grad_gains: shape ``(T, r, d)``.
        start: the network's state before step 0, entries ``(r, k)``.
    """
    weights: list[Tensor] = list(rule.parameters())
    meta = [torch.zeros_like(w) for w in weights]
    for low in range(0, features.shape[1], REPLAY_ROWS):
        part = slice(low, low + REPLAY_ROWS)
        with torch.enable_grad():
            state = {key: value[part] for key, value in start.items()}
            gains, _ = rule.respond(features[:, part].contiguous(), state)
            objective = (gains * grad_gains[:, part]).sum()
            grads = torch.autograd.grad(objective, weights, allow_unused=True)
        for total, grad in zip(meta, grads, strict=True):
            if grad is not None:
                total += grad
    return meta


def _sample_coordinates(sizes: Sequence[int], options: EstimatorOptions) -> tuple[Tensor, Tensor]:
    """Sorted indices of sampled coordinates, and by what to weight them.

    Args:
        sizes: coordinates of each tensor.
        options: how many to draw, and how.
    """
    total, count = sum(sizes), options.coordinates
    if count is None or count >= total:
        return torch.arange(total), torch.ones(total, dtype=torch.float64)
    if options.sampling == "uniform":
        chosen = torch.randperm(total, generator=options.generator)[:count].sort().values
        return chosen, torch.full((count,), total / count, dtype=torch.float64)
    share, offset = _fair_share(sizes, count), 0
    indices, weights = [], []
    for size in sizes:
        some = torch.arange(size)
        if share < size:
            some = torch.randperm(size, generator=options.generator)[:share].sort().values
        indices.append(some + offset)
        weights.append(torch.full((len(some),), size / max(1, len(some)), dtype=torch.float64))
        offset += size
    return torch.cat(indices), torch.cat(weights)


def _fair_share(sizes: Sequence[int], count: int) -> int:
    """What each may have of ``count`` at most, such that whoever needs less leaves the rest.

    At least 1: with more of them than ``count``, each has one.
    """
    ordered = sorted(sizes)
    for i, size in enumerate(ordered):
        share = count // (len(ordered) - i)
        if size > share:
            return max(1, share)
        count -= size
    return ordered[-1]


ESTIMATORS: dict[str, Estimator] = {
    "autograd": autograd,
    "replay": replay,
    "full": full,
    "es": es,
    "pes": pes,
}
