"""Meta-gradients: of an unroll's losses, in the weights of the update rule.

All estimators share one signature, ``estimator(rule, optimizees, steps, options) ->
MetaGradient``, and leave ``optimizees`` where the unroll ended, detached. The meta-loss of an
unroll is the sum over its steps of the loss at the parameters *before* each update (thesis eq. 3.4
with w_t = 1), averaged over the optimizees.

``autograd``   truncated backpropagation through time with d grad / d phi = 0: the thesis's.
``replay``     the same gradients from a rollout without a graph: see :func:`replay`.
``full``       second derivatives kept: exact for the unroll; the reference for the others.
``pes``        persistent evolution strategies, without derivatives or the bias of truncation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import State, UpdateRule

# Coordinates per slice of a replay: recurrent activations of 1,000 rows and 20 steps stay near the
# cache, which halves the backward pass's time per coordinate against one slice of 4,000.
REPLAY_ROWS = 1000


@dataclass(frozen=True)
class EstimatorOptions:
    """Options of the estimators; each reads its own.

    Attributes:
        coordinates: of ``replay``: sample this many coordinates (unbiased); ``None``: all.
        generator: draws the sample of ``replay``, or the perturbations of ``pes``.
        sampling: ``"uniform"`` over all coordinates, or ``"stratified"``: the same number from
            every tensor, and all coordinates of tensors that have fewer. A small tensor, such as an
            output layer, can carry most of the meta-gradient, and a uniform sample of a large
            network rarely contains it.
        pairs: of ``pes``: pairs of opposite perturbations; the same in all unrolls of a run.
        sigma: of ``pes``: standard deviation of the perturbations of each weight.
    """

    coordinates: int | None = None
    generator: Generator | None = None
    sampling: Literal["uniform", "stratified"] = "uniform"
    pairs: int = 4
    sigma: float = 0.01


@dataclass(frozen=True)
class MetaGradient:
    """The outcome of one unroll.

    Attributes:
        losses: under the rule's own weights, shape ``(steps, B)``, detached.
        grads: d meta-loss / d weight, one per ``rule.parameters()``.
    """

    losses: Tensor
    grads: list[Tensor]


Estimator: TypeAlias = Callable[[UpdateRule, Optimizees, int, EstimatorOptions], MetaGradient]


# ---- backpropagation


def _backpropagate(
    rule: UpdateRule, optimizees: Optimizees, steps: int, first_order: bool
) -> MetaGradient:
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            batch, packed = optimizees.next_batch(), optimizees.packed
            if first_order:
                _, grad = optimizees.losses_and_grad(packed, batch)
                loss, before = optimizees.losses(packed, batch), packed.detach()
            else:
                if not packed.requires_grad:
                    packed.requires_grad_()
                loss, grad = optimizees.losses_and_grad(packed, batch, create_graph=True)
                before = packed
            losses.append(loss)
            update, state = optimizees.forward(rule, grad, before, loss)
            optimizees.packed = packed + update
            optimizees.state = {**optimizees.state, **state}
            optimizees.step += 1
        stacked = torch.stack(losses)  # (steps, B)
        weights = list(rule.parameters())
        grads = torch.autograd.grad(stacked.sum(0).mean(), weights, materialize_grads=True)
    optimizees.packed = optimizees.packed.detach()
    optimizees.state = {key: value.detach() for key, value in optimizees.state.items()}
    return MetaGradient(stacked.detach(), list(grads))


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

    Rules without rows, which do not split into features and a response, go by :func:`autograd`.

    With d grad / d phi = 0 the parameters enter the meta-loss only as sums of updates:

        dL / dphi = sum_t sum_i A_{t,i} d u_{t,i} / d phi,   A_t = sum_{s > t} grad f(theta_s).

    An update is a sum of directions D, which do not depend on the weights, times gains:

        dL / dgain_{t,r,d} = sum over coordinates i of row r of A_{t,i} D_{t,i,d}.

    The optimizees are rolled out without any graph. Then the recorded features are fed through
    the network once more and ``sum(gains * dL/dgains)`` is back-propagated: for all rows, or, where
    rows are coordinates, for some that are drawn at random.
    """
    if rule.rows == "none":
        return autograd(rule, optimizees, steps, options)
    by_tensor = rule.rows == "tensors"
    segments = optimizees.segments
    if by_tensor:
        rows = torch.arange(len(segments))
        scale = torch.ones(len(segments), dtype=torch.float64)
    else:
        rows, scale = _sample_coordinates(segments.sizes, options)
    start = {key: optimizees.state[key][rows] for key in rule.network_state}
    record = [optimizees.advance_recorded(rule) for _ in range(steps)]

    future_grads = torch.zeros_like(optimizees.packed if by_tensor else optimizees.packed[rows])
    grad_gains = []  # dL / dgains, (r, d) per step, last first
    for step in reversed(record):
        if by_tensor:
            products = [(direction, future_grads) for direction in step.directions.t()]
            grad_gains.append(segments.sums(products).t())
            future_grads = future_grads + step.grad
        else:
            grad_gains.append(future_grads.unsqueeze(1) * step.directions[rows])
            future_grads = future_grads + step.grad[rows]
    slopes = torch.stack(grad_gains[::-1])  # (T, r, d)
    slopes = slopes * (scale / len(optimizees)).to(slopes.dtype).unsqueeze(1)
    features = torch.stack([step.features if by_tensor else step.features[rows] for step in record])
    losses = torch.stack([step.losses for step in record])
    return MetaGradient(losses, _backpropagate_gains(rule, features, slopes, start))


def _backpropagate_gains(
    rule: UpdateRule, features: Tensor, grad_gains: Tensor, start: State
) -> list[Tensor]:
    """The gradient of ``sum(gains * grad_gains)``, each ``(T, r, d)``, slice by slice of rows.

    The rule's network runs over the features, ``(T, r, f)``, from the state ``start``, ``(r, k)``.
    """
    weights: list[Tensor] = list(rule.parameters())
    meta = [torch.zeros_like(w) for w in weights]
    for low in range(0, features.shape[1], REPLAY_ROWS):
        part = slice(low, low + REPLAY_ROWS)
        with torch.enable_grad():
            state = {key: value[part] for key, value in start.items()}
            gains, _ = rule.respond(features[:, part].contiguous(), state)
            objective = (gains * grad_gains[:, part]).sum()
            grads = torch.autograd.grad(objective, weights, materialize_grads=True)
        for total, grad in zip(meta, grads, strict=True):
            total += grad
    return meta


def _sample_coordinates(sizes: Sequence[int], options: EstimatorOptions) -> tuple[Tensor, Tensor]:
    """Sorted indices and weights of a sample of coordinates of tensors of these sizes."""
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
    """The largest sample per tensor, at least 1, for ``count`` coordinates in all."""
    ordered = sorted(sizes)
    for i, size in enumerate(ordered):
        share = count // (len(ordered) - i)
        if size > share:
            return max(1, share)
        count -= size
    return ordered[-1]


# ---- persistent evolution strategies


def pes(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, algorithm 2).

    Pairs of opposite perturbations of the rule's weights phi train copies of the optimizees, on the
    same batches and with the same random numbers, so that noise cancels in the difference of a
    pair. Both runs of a pair go on from unroll to unroll, each from where its own perturbations
    have led. With the fitness L of an unroll under perturbations e_i ~ N(0, sigma^2 I), and the sum
    E_i of all perturbations of the pair so far, the estimate is

        1 / (2 N sigma^2) * sum over i of E_i (L(phi + e_i) - L(phi - e_i)).

    Summed over the unrolls of a run, and if the weights do not change meanwhile, it is unbiased for
    the gradient of the whole run's smoothed fitness. Memory does not grow with the unroll's length.
    The particles are kept in ``optimizees.carry`` and begin anew with every run.
    """
    if optimizees.carry is None:
        copies = [optimizees.copy() for _ in range(2 * options.pairs)]
        optimizees.carry = copies, torch.zeros((), dtype=rule.dtype)
    particles, directions = optimizees.carry
    weights = list(rule.parameters())
    sizes = [weight.numel() for weight in weights]
    fresh = torch.randn(options.pairs, sum(sizes), generator=options.generator, dtype=rule.dtype)
    directions = directions + fresh
    optimizees.carry = particles, directions
    changes = (options.sigma * torch.stack((fresh, -fresh), 1)).flatten(0, 1)
    rules = [_perturbed(rule, change) for change in changes]
    runs = [*zip(rules, particles, strict=True), (rule, optimizees)]
    rows = []
    for _ in range(steps):
        batch, dropout = optimizees.next_batch(), torch.get_rng_state()
        for perturbed, run in runs:
            torch.set_rng_state(dropout)
            rows.append(run.advance(perturbed, batch))
    losses = torch.stack(rows).unflatten(0, (steps, len(runs)))  # (steps, runs, B)
    # In float64: the difference within a pair is much smaller than the losses.
    fitness = losses[:, :-1].double().sum(0).mean(1).view(-1, 2)  # (pairs, 2)
    slopes = (fitness[:, 0] - fitness[:, 1]) / (2 * options.sigma)
    flat = (slopes.to(rule.dtype).unsqueeze(1) * directions).mean(0)
    grads = [part.view_as(w) for part, w in zip(flat.split(sizes), weights, strict=True)]
    return MetaGradient(losses[:, -1], grads)


def _perturbed(rule: UpdateRule, change: Tensor) -> UpdateRule:
    """A copy of the rule with ``change``, ``(weights,)``, added to its weights."""
    other = copy.deepcopy(rule)
    with torch.no_grad():
        weights = parameters_to_vector(rule.parameters())
        vector_to_parameters(weights + change, other.parameters())
    return other


ESTIMATORS: dict[str, Estimator] = {
    "autograd": autograd,
    "replay": replay,
    "full": full,
    "pes": pes,
}
