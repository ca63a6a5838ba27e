"""Antithetic evolution strategies on unrolls: truncated, and persistent.

Pairs of opposite perturbations of the rule's weights train copies of the optimizees, on the same
batches and with the same random numbers, so that noise cancels in the difference of a pair
(Salimans et al. 2017, arXiv 1703.03864). No derivatives are taken:
memory does not grow with the length of the unroll, and chaotic runs are smoothed on the scale of
the perturbations (Metz et al. 2019, arXiv 1810.10180).

Ranks share the pairs and not the optimizees. Every rank draws all perturbations from the same
seed and runs some of them, and then only fitness and losses are exchanged, a few numbers per pair.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from learned_optim.meta._estimator import EstimatorOptions, MetaGradient
from learned_optim.meta.rollout import Optimizees
from learned_optim.rules import UpdateRule


@dataclass
class Particles:
    """Pairs of runs under opposite perturbations.

    Attributes:
        runs: the two of each pair that this rank runs, by the pair's number.
        directions: the sum of the perturbations that each pair has had, of all ranks' pairs, in
            units of sigma; shape ``(pairs, weights)``.
    """

    runs: dict[int, tuple[Optimizees, Optimizees]]
    directions: Tensor


def es(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """Antithetic evolution strategies on the unroll.

    With fitness L of the unroll, which begins where the rule's own weights phi have led,

        1 / (2 N sigma^2) * sum over i of e_i (L(phi + e_i) - L(phi - e_i)),  e_i ~ N(0, sigma^2 I)

    estimates the gradient of L smoothed by the perturbations: of this unroll alone, as truncated
    backpropagation does, whatever it changes later on.
    """
    fresh = _perturbations(rule, options)
    particles = Particles(_pairs(optimizees, options), fresh)
    return _estimate(rule, optimizees, steps, options, fresh, particles)


def pes(
    rule: UpdateRule, optimizees: Optimizees, steps: int, options: EstimatorOptions
) -> MetaGradient:
    """Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, algorithm 2).

    As :func:`es`, but both runs of a pair go on from unroll to unroll, each from where its own
    perturbations have led, and the difference of an unroll is credited to the sum of all
    perturbations so far. Summed over the unrolls of a run this estimates, without bias if the
    weights stay as they are meanwhile, the gradient of the sum of their fitness, smoothed by the
    perturbations. The particles are kept in ``optimizees.carry``, and begin anew with every run.

    Raises:
        ValueError: other pairs, or another share of them, than in the run's earlier unrolls.
    """
    fresh = _perturbations(rule, options)
    particles = optimizees.carry
    if not isinstance(particles, Particles):
        particles = Particles(_pairs(optimizees, options), torch.zeros_like(fresh))
    if len(particles.directions) != options.pairs or list(particles.runs) != _share(options):
        raise ValueError(
            f"pairs={options.pairs} on rank {options.rank} of {options.world} do not continue the "
            f"{len(particles.directions)} pairs of the run's earlier unrolls: change them between "
            f"runs"
        )
    particles.directions = particles.directions + fresh
    optimizees.carry = particles
    return _estimate(rule, optimizees, steps, options, fresh, particles)


def _perturbations(rule: UpdateRule, options: EstimatorOptions) -> Tensor:
    """Standard normal directions of all pairs, on every rank the same, ``(pairs, weights)``."""
    if options.world > 1 and options.generator is None:
        raise ValueError(
            "perturbations must be the same on all ranks: give a generator seeded alike"
        )
    count = sum(weight.numel() for weight in rule.parameters())
    return torch.randn(options.pairs, count, generator=options.generator, dtype=rule.dtype)


def _share(options: EstimatorOptions) -> list[int]:
    """Numbers of the pairs that this rank runs."""
    return list(range(options.rank, options.pairs, options.world))


def _pairs(
    optimizees: Optimizees, options: EstimatorOptions
) -> dict[int, tuple[Optimizees, Optimizees]]:
    return {pair: (optimizees.copy(), optimizees.copy()) for pair in _share(options)}


def _perturbed(rule: UpdateRule, change: Tensor) -> UpdateRule:
    """A copy of the rule with ``change``, ``(weights,)``, added to its weights."""
    other = copy.deepcopy(rule)
    with torch.no_grad():
        weights = parameters_to_vector(rule.parameters())
        vector_to_parameters(weights + change, other.parameters())
    return other


def _estimate(
    rule: UpdateRule,
    optimizees: Optimizees,
    steps: int,
    options: EstimatorOptions,
    fresh: Tensor,
    particles: Particles,
) -> MetaGradient:
    """Unroll the pairs and the optimizees themselves; gather the fitness; weight the directions.

    Args:
        fresh: perturbations of this unroll, in units of sigma, ``(pairs, weights)``.
    """
    losses, fitness = _unroll(rule, optimizees, steps, options, fresh, particles)
    losses, fitness = _exchange(losses, fitness, options)
    difference = fitness[:, 0] - fitness[:, 1]  # (pairs, B)
    slopes = difference.mean(1) / (2 * options.sigma)  # (pairs,)
    # Pair after pair, so that the sum's bits do not depend on how a matrix product is split.
    flat = torch.zeros_like(particles.directions[0])
    for slope, direction in zip(slopes.tolist(), particles.directions, strict=True):
        flat += slope / options.pairs * direction
    weights = list(rule.parameters())
    parts = flat.split([weight.numel() for weight in weights])
    return MetaGradient(
        losses, [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    )


def _unroll(
    rule: UpdateRule,
    optimizees: Optimizees,
    steps: int,
    options: EstimatorOptions,
    fresh: Tensor,
    particles: Particles,
) -> tuple[Tensor, Tensor]:
    """All runs side by side: every batch is drawn once, and every forward pass sees one dropout.

    Returns:
        ``(losses, fitness)``: under the rule's own weights, ``(steps, B)``; and of both runs of
        each pair, ``(pairs, 2, B)``, float64, zero where another rank runs the pair.
    """
    runs: list[tuple[UpdateRule, Optimizees]] = []
    for pair, (plus, minus) in particles.runs.items():
        change = options.sigma * fresh[pair]
        runs += [(_perturbed(rule, change), plus), (_perturbed(rule, -change), minus)]
    runs.append((rule, optimizees))
    losses = []
    for _ in range(steps):
        batch, dropout = optimizees.next_batch(), torch.get_rng_state()
        for weights, run in runs:
            torch.set_rng_state(dropout)
            losses.append(run.advance(weights, batch))
    stacked = torch.stack(losses).unflatten(0, (steps, len(runs)))  # (steps, runs, B)
    fitness = stacked.new_zeros((options.pairs, 2, len(optimizees)), dtype=torch.float64)
    if particles.runs:
        # In float64: what the two of a pair have in common is much larger than their difference.
        each = stacked[:, :-1].double().sum(0)  # (runs of pairs, B)
        fitness[list(particles.runs)] = each.unflatten(0, (-1, 2))
    return stacked[:, -1], fitness


def _exchange(losses: Tensor, fitness: Tensor, options: EstimatorOptions) -> tuple[Tensor, Tensor]:
    """Every rank's fitness on every rank, and the losses of the first.

    Each entry comes from one rank, zeros from all others, so that nothing is rounded. The losses
    travel along because ranks must agree to the bit on whether to drop an unroll.
    """
    if options.world == 1:
        return losses, fitness
    ours = losses.double() if options.rank == 0 else torch.zeros_like(losses, dtype=torch.float64)
    packed = torch.cat([ours.flatten(), fitness.flatten()])
    dist.all_reduce(packed)
    first, rest = packed.split([losses.numel(), fitness.numel()])
    return first.view_as(losses).to(losses.dtype), rest.view_as(fitness)
