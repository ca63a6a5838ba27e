"""Whole runs of populations, the optimizers of all copies, and the scores of runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from learned_optim import kernels
from learned_optim.meta.populations._base import Params, copies_of
from learned_optim.meta.populations.mixture import Draw, run_generators
from learned_optim.rules import State, StepSettings, UpdateRule
from learned_optim.rules.horizon import HorizonRule

#: Peak learning rates among which AdamW is tuned.
ADAMW_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_ADAMW_DECAY, _ADAMW_WARMUP = 0.01, 0.05
_ADAMW_BETAS, _ADAMW_EPS = (0.9, 0.999), 1e-8

# Losses are in units of the first one. These bounds clip them before they are averaged, and
# _OFFSET is added before the log.
_LARGEST, _SMALLEST_FIRST, _OFFSET = 1e3, 1e-12, 1e-4
# Times of a run at which the loss is read for its mean, geometrically spaced.
_TIMES = 20
# Steps over which losses are averaged before their rise counts.
_RISE_WINDOW = 5
# Shares of the final and of the mean loss in the fitness, of runs with known and unknown length.
_SHARES_KNOWN, _SHARES_UNKNOWN = (0.8, 0.2), (0.5, 0.5)


def roll(rule: UpdateRule, weights: Tensor, run: Draw, seed: int) -> tuple[Tensor, Tensor | None]:
    """Train a population under several weights of a rule at once.

    Args:
        rule: gives architecture and configuration.
        weights: float32 of shape ``(B, number of weights)``.
        run: what :func:`draw` gave for ``seed``.
        seed: of the initial parameters, batches and jitter.

    Returns:
        Losses before each step, float64 of shape ``(steps, B)``; and the held-out losses before the
        first step and after the last, ``(2, B)``, or None without held-out examples.
    """
    total = run.steps if run.known else None
    return _roll(lambda initial: CopiesOptimizer(rule, weights, initial, total), run, seed)


def roll_adamw(lrs: Sequence[float], run: Draw, seed: int) -> Tensor:
    """Losses ``(steps, lrs)`` under AdamW, a copy for each peak learning rate.

    They warm up over the first twentieth of the run, and, if its length is known, follow a cosine.
    """
    return _roll(lambda initial: _AdamW(initial, lrs, run), run, seed)[0]


def _roll(
    optimizer_of: Callable[[Params], CopiesOptimizer | _AdamW], run: Draw, seed: int
) -> tuple[Tensor, Tensor | None]:
    task = run.task
    generator, jitter = run_generators(seed)
    optimizer = optimizer_of(task.initial(generator))
    params, rows = optimizer.params, []

    @torch.no_grad()
    def held_out_losses() -> list[Tensor]:
        return [] if task.held_out is None else [task.losses(params, task.held_out)]

    held_out = held_out_losses()
    for _ in range(run.steps):
        losses = task.losses(params, task.batch(generator))
        total = losses.sum()
        if task.jitter:
            total = total * math.exp(task.jitter * torch.randn((), generator=jitter).item())
        optimizer.step(torch.autograd.grad(total, list(params.values())))
        rows.append(losses.detach())
    held_out += held_out_losses()
    return torch.stack(rows).double(), torch.stack(held_out).double() if held_out else None


# ---- optimizers of all copies


class CopiesOptimizer:
    """Trains ``B`` copies of the same parameters, copy ``b`` by the rule with weights ``b``.

    Where the rule has a compiled kernel, one call of it steps all tensors of all copies. Otherwise
    each copy is stepped by :meth:`UpdateRule.step_`, correct and slow.

    Args:
        rule: gives architecture and configuration; its weights do not matter.
        weights: float32 of shape ``(B, number of weights)``, in the order of ``rule.parameters()``.
        initial: the parameters of one copy by name, from which all copies begin.
        total_steps: length of the run, if the rule is to know it.

    Attributes:
        params: the copies by name, float32 leaves of shape ``(B, *shape)``.
    """

    def __init__(
        self, rule: UpdateRule, weights: Tensor, initial: Params, total_steps: int | None = None
    ) -> None:
        self.params = copies_of(initial, len(weights))
        decay = rule.default_weight_decay(total_steps)
        self._settings = StepSettings(weight_decay=decay, total_steps=total_steps)
        self._rules = [_with_weights(rule, vector) for vector in weights]
        # Tensors in the order (name, copy); a slice of a contiguous tensor is contiguous.
        self._slices = [s for p in self.params.values() for s in p.detach().unbind()]
        self._states = [
            state
            for value in initial.values()
            for state in _first_states(rule, value, len(weights))
        ]
        self._rotation = None
        if isinstance(rule, HorizonRule):  # all copies of a matrix are refreshed in the same step
            staggers = [index for index in range(len(initial)) for _ in self._rules]
            self._rotation = rule.rotation(self._slices, self._states, staggers)
        # Weights of the network of every slice, stacked: (slices, *shape).
        self._networks = [
            torch.stack(columns).repeat(len(initial), *[1] * columns[0].dim())
            for columns in zip(*(own.parameters() for own in self._rules), strict=True)
        ]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of all copies, by gradients of :attr:`params` in their order."""
        slices = [s for grad in grads for s in grad.contiguous().unbind()]
        states, settings = self._states, self._settings
        seen: Sequence[Tensor] = slices
        updates: Sequence[Tensor | None] = [None] * len(slices)
        if self._rotation is not None:
            seen, updates = self._rotation.rotate(slices)
        call = self._networks, self._slices, seen, states, settings, updates
        if not (isinstance(self._rules[0], HorizonRule) and kernels.step_(*call)):
            for own, params, part, of, apart in self._by_copy(seen, states, updates):
                own.step_(params, part, of, settings, updates=apart)
        if self._rotation is not None:
            self._rotation.rotate_back()

    def _by_copy(self, *columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Each copy's rule, parameters and part of every column."""
        copies = len(self._rules)
        for index, rule in enumerate(self._rules):
            yield rule, *(column[index::copies] for column in (self._slices, *columns))


def _with_weights(rule: UpdateRule, vector: Tensor) -> UpdateRule:
    own = copy.deepcopy(rule).requires_grad_(False)
    vector_to_parameters(vector.detach().float().clone(), own.parameters())
    return own


def _first_states(rule: UpdateRule, param: Tensor, copies: int) -> list[State]:
    """States of all copies of a parameter, each entry side by side in memory."""
    param = param.detach().float()
    matrices = rule.init_matrices(param.shape, param.device)
    fresh = {"step": torch.zeros(()), **rule.init_state(param), **matrices}
    stacks = {key: value.repeat(copies, *[1] * value.dim()) for key, value in fresh.items()}
    return [{key: stack[copy] for key, stack in stacks.items()} for copy in range(copies)]


class _AdamW:
    """AdamW on stacked copies, each with its own peak learning rate.

    ``torch.optim.AdamW`` needs a group per copy, and takes up to eight times as long.
    """

    def __init__(self, initial: Params, lrs: Sequence[float], run: Draw) -> None:
        self.params = copies_of(initial, len(lrs))
        self._lrs, self._run, self._done = torch.tensor(lrs), run, 0
        self._means = [torch.zeros_like(param) for param in self.params.values()]
        self._squares = [torch.zeros_like(param) for param in self.params.values()]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        run, (beta, square_beta) = self._run, _ADAMW_BETAS
        schedule = min(1, (self._done + 1) / max(1, _ADAMW_WARMUP * run.steps))
        if run.known:
            schedule *= 0.5 * (1 + math.cos(math.pi * self._done / run.steps))
        self._done += 1
        correction, square_correction = 1 - beta**self._done, 1 - square_beta**self._done
        for param, grad, mean, square in zip(
            self.params.values(), grads, self._means, self._squares, strict=True
        ):
            lr = (self._lrs * schedule).view(-1, *[1] * (param.dim() - 1))
            mean.lerp_(grad, 1 - beta)
            square.mul_(square_beta).addcmul_(grad, grad, value=1 - square_beta)
            root = (square / square_correction).sqrt() + _ADAMW_EPS
            param.mul_(1 - lr * _ADAMW_DECAY).sub_(lr * (mean / correction) / root)


# ---- scores


def scores(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of every copy's run, the lower the better.

    Losses, ``(steps, B)``, that are not finite count as a thousand times the first one.

    Returns:
        ``(final, mean)``, each of shape ``(B,)``: the log of the mean loss of the last twentieth,
        and the mean of the log loss at geometrically spaced times, both relative to the first
        loss of all copies.
    """
    steps = len(losses)
    bounded = _relative(losses)

    def log_mean(low: int, high: int) -> Tensor:
        return (bounded[low:high].mean(0).clamp(min=0) + _OFFSET).log()

    final = log_mean(max(0, steps - max(5, steps // 20)), steps)
    # Whole powers must not be rounded down.
    times = sorted({int(steps ** (i / (_TIMES - 1)) + 1e-9) for i in range(_TIMES)})
    mean = torch.stack([log_mean(max(0, t - max(1, t // 5)), t) for t in times]).mean(0)
    return final, mean


def rise(losses: Tensor) -> Tensor:
    """Rise above the first loss in log units, maximum plus half the mean: ``(B,)``.

    Runs may damage trained weights and recover, which the final loss does not show. Losses are
    averaged over five steps, because batches differ.
    """
    bounded = _relative(losses)
    windows = bounded.unfold(0, min(_RISE_WINDOW, len(bounded)), 1).mean(-1)
    above = windows.clamp(min=1.0).log()
    return above.amax(0) + 0.5 * above.mean(0)


def fitness(losses: Tensor, known: bool, held_out: Tensor | None = None) -> Tensor:
    """What evolution strategies minimize, of every copy, shape ``(B,)``.

    Shares of the final and the mean loss (:func:`scores`), and the whole of :func:`rise`. Where
    examples are held out, their loss counts for half of the final one.
    """
    final, mean = scores(losses)
    if held_out is not None:
        last = _relative(held_out)[-1]
        final = 0.5 * final + 0.5 * (last.clamp(min=0) + _OFFSET).log()
    final_share, mean_share = _SHARES_KNOWN if known else _SHARES_UNKNOWN
    return final_share * final + mean_share * mean + rise(losses)


def _relative(losses: Tensor) -> Tensor:
    """Losses in units of the first one, within bounds; NaN if the first one is infinite."""
    first = losses[0].mean().abs().nan_to_num(_SMALLEST_FIRST, math.inf).clamp(_SMALLEST_FIRST)
    finite = torch.where(losses.isfinite(), losses, math.inf) / first
    return finite.clamp(-_LARGEST, _LARGEST)
