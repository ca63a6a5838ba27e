"""Meta-gradients: how the loss over an unroll depends on the update rule's weights.

All estimators share one signature, ``estimator(rule, optimizees, steps, options) ->
MetaGradient``, and leave ``optimizees`` where the unroll ended, detached. The meta-loss of an
unroll is the sum over its steps of the loss at the parameters *before* each update (thesis eq.
3.4 with w_t = 1), averaged over the optimizees.

``autograd``   truncated backpropagation through time with d grad / d phi = 0: the thesis's.
``replay``     the same gradients from a rollout without a graph: see :func:`replay`.
``full``       second derivatives kept: exact for the unroll; the reference for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import RecurrentRule, State, TensorRule, UpdateRule, tensor_of_each

Sampling = Literal["uniform", "stratified"]

# Coordinates per slice of a replay: recurrent activations of 1,000 rows and 20 steps stay near the
# cache, which halves the backward pass's time per coordinate against one slice of 4,000.
REPLAY_ROWS = 1000


@dataclass(frozen=True)
class EstimatorOptions:
    """What some estimators can be told.

    Attributes:
        coordinates: replay this many randomly sampled coordinates (unbiased); ``None``: all.
        generator: draws them.
        sampling: ``"uniform"`` over all coordinates, or ``"stratified"``: as many of every tensor,
            and all of those that have fewer. A small tensor, an output layer say, can carry most
            of the meta-gradient, and a uniform sample of a large network hardly meets it.
    """

    coordinates: int | None = None
    generator: Generator | None = None
    sampling: Sampling = "uniform"


@dataclass(frozen=True)
class MetaGradient:
    """The outcome of one unroll.

    Attributes:
        losses: shape ``(steps, B)``, detached.
        grads: d meta-loss / d weight, one per ``rule.parameters()``.
    """

    losses: Tensor
    grads: list[Tensor]


Estimator = Callable[[UpdateRule, Optimizees, int, EstimatorOptions], MetaGradient]


def _backpropagate(
    rule: UpdateRule, optimizees: Optimizees, steps: int, first_order: bool
) -> MetaGradient:
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            batch = optimizees.next_batch()
            if first_order:
                _, grads = optimizees.losses_and_grads(optimizees.params, batch)
                loss = optimizees.losses(optimizees.params, batch)
            else:
                for param in optimizees.params.values():
                    if not param.requires_grad:
                        param.requires_grad_()
                loss, grads = optimizees.losses_and_grads(optimizees.params, batch, True)
            losses.append(loss)
            for name, grad in grads.items():
                param = optimizees.params[name]
                seen = param.detach() if first_order else param
                update, state = optimizees.forward(rule, name, grad, seen, loss)
                optimizees.params[name] = param + update
                optimizees.state[name] = {**optimizees.state[name], **state}
            optimizees.step += 1
        stacked = torch.stack(losses)  # (steps, B)
        weights = list(rule.parameters())
        meta = torch.autograd.grad(stacked.sum(0).mean(), weights, allow_unused=True)
    for name in optimizees.params:
        optimizees.params[name] = optimizees.params[name].detach()
        optimizees.state[name] = {k: v.detach() for k, v in optimizees.state[name].items()}
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

        dL / dphi = sum_t sum_i A_{t,i} d u_{t,i} / d phi,   A_t = sum_{s > t} grad f(theta_s):

    the meta-gradient separates by coordinate. The optimizees are rolled out without any graph,
    then the recorded signals of all, or of some randomly sampled, coordinates are fed through the
    network once more and ``sum(A * u)`` is back-propagated.

    Of a :class:`TensorRule`, whose updates are directions times gains, the sum over a tensor's
    coordinates is taken first, and the network is replayed once per tensor: without sampling.

    Raises:
        TypeError: the rule does not split into observation and response.
    """
    if isinstance(rule, TensorRule):
        return _replay_tensors(rule, optimizees, steps)
    if not isinstance(rule, RecurrentRule):
        raise TypeError(
            f"estimator 'replay' needs a RecurrentRule or a TensorRule, and "
            f"{type(rule).__name__} is neither: "
            f"use estimator='autograd'"
        )
    strata = _strata(optimizees, options.sampling)
    index = _sample_coordinates(strata, options)

    start: dict[str, State] = {}  # the network's state before the unroll, (sampled, k)
    for name, (chosen, _) in index.items():
        state = optimizees.state[name]
        start[name] = {key: state[key].flatten(0, -2)[chosen] for key in rule.network_state}
    losses: list[Tensor] = []
    signals: dict[str, list[Tensor]] = {name: [] for name in index}
    slopes: dict[str, list[Tensor]] = {name: [] for name in index}
    for _ in range(steps):
        loss, grads, seen = optimizees.advance_recorded(rule)
        losses.append(loss)
        for name, (chosen, _) in index.items():
            signals[name].append(seen[name][chosen])
            slopes[name].append(grads[name].reshape(-1)[chosen])

    weights: list[Tensor] = list(rule.parameters())
    meta = [torch.zeros_like(w) for w in weights]
    for name, (chosen, scale) in index.items():
        if not len(chosen):
            continue
        g = torch.stack(slopes[name])  # (T, n)
        after = g.flip(0).cumsum(0).flip(0) - g  # suffix sums over s > t
        after *= (scale / len(optimizees)).to(after.dtype)
        _accumulate(rule, torch.stack(signals[name]), after, start[name], weights, meta)
    return MetaGradient(torch.stack(losses), meta)


def _replay_tensors(rule: TensorRule, optimizees: Optimizees, steps: int) -> MetaGradient:
    """:func:`replay` by tensor: dL / dgain_{t,j,d} = sum over i in j of A_{t,i} D_{t,i,d}."""
    state = optimizees.state
    start = {key: torch.cat([state[name][key] for name in state]) for key in rule.network_state}
    sizes = [param[0].numel() for param in optimizees.params.values() for _ in param]
    record = [optimizees.advance_steered(rule) for _ in range(steps)]
    losses, grads, features, directions = (list(column) for column in zip(*record, strict=True))
    owner = tensor_of_each(sizes, grads[0].device)
    after = torch.zeros_like(grads[0])  # sum of the gradients at later steps of the unroll
    slopes = []  # d meta-loss / d gains, (m, d) per step, last first
    for grad, direction in zip(reversed(grads), reversed(directions), strict=True):
        slope = direction.new_zeros(len(sizes), direction.shape[1])
        slopes.append(slope.index_add_(0, owner, after.unsqueeze(1) * direction))
        after = after + grad
    weights = list(rule.parameters())
    with torch.enable_grad():
        gains, _ = rule.gains(torch.stack(features), start)
        objective = (gains * torch.stack(slopes[::-1])).sum() / len(optimizees)
        meta = torch.autograd.grad(objective, weights, allow_unused=True)
    return MetaGradient(torch.stack(losses), _zeros_for_none(meta, weights))


def _strata(optimizees: Optimizees, sampling: Sampling) -> dict[str, list[int]]:
    """Sizes of what is sampled from separately, in the order of each parameter's coordinates."""
    if sampling == "uniform":
        return {name: [param.numel()] for name, param in optimizees.params.items()}
    return optimizees.tensor_sizes()


def _sample_coordinates(
    strata: dict[str, list[int]], options: EstimatorOptions
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sorted indices into each parameter's flattened coordinates, and by what to weight them."""
    if options.coordinates is None or options.coordinates >= sum(map(sum, strata.values())):
        everything = {name: sum(sizes) for name, sizes in strata.items()}
        return {
            name: (torch.arange(n), torch.ones(n, dtype=torch.float64))
            for name, n in everything.items()
        }
    if options.sampling == "uniform":
        return _sample_uniformly(strata, options.coordinates, options.generator)
    index = {}
    share = _fair_share([size for sizes in strata.values() for size in sizes], options.coordinates)
    for name, sizes in strata.items():
        chosen, weights, offset = [], [], 0
        for size in sizes:
            some = torch.arange(size)
            if share < size:
                order = torch.randperm(size, generator=options.generator)
                some = order[:share].sort().values
            chosen.append(some + offset)
            weights.append(torch.full((len(some),), size / max(1, len(some)), dtype=torch.float64))
            offset += size
        index[name] = torch.cat(chosen), torch.cat(weights)
    return index


def _sample_uniformly(
    strata: dict[str, list[int]], count: int, generator: Generator | None
) -> dict[str, tuple[Tensor, Tensor]]:
    sizes = {name: sum(parts) for name, parts in strata.items()}
    total = sum(sizes.values())
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    index, offset = {}, 0
    for name, size in sizes.items():
        inside = chosen[(chosen >= offset) & (chosen < offset + size)] - offset
        index[name] = inside, torch.full((len(inside),), total / count, dtype=torch.float64)
        offset += size
    return index


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


def _accumulate(
    rule: RecurrentRule,
    signals: Tensor,
    after: Tensor,
    start: State,
    weights: list[Tensor],
    meta: list[Tensor],
) -> None:
    """Add the gradient of ``sum(after * updates)`` to ``meta``, slice by slice of coordinates."""
    for low in range(0, signals.shape[1], REPLAY_ROWS):
        part = slice(low, low + REPLAY_ROWS)
        with torch.enable_grad():
            state = {k: v[part] for k, v in start.items()}
            updates, _ = rule.respond(signals[:, part].contiguous(), state)
            objective = (updates * after[:, part]).sum()
            grads = torch.autograd.grad(objective, weights, allow_unused=True)
        for total, grad in zip(meta, grads, strict=True):
            if grad is not None:
                total += grad


ESTIMATORS: dict[str, Estimator] = {"autograd": autograd, "replay": replay, "full": full}
