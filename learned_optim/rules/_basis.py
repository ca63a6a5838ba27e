"""The eigenbasis of a matrix: rotation, covariances, refresh.

A rule reads a gradient matrix ``G`` in coordinates in which its entries are least correlated, the
basis of SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3):

    L <- lerp(L, G G^T),  R <- lerp(R, G^T G)    running covariances of the rotated sides
    Q_L <- qr(L Q_L),     Q_R <- qr(R Q_R)       refresh: one step of subspace iteration
    g = Q_L^T G Q_R                              what the rule reads; its moments live here
    W <- W + Q_L u Q_R^T                         the rule's update u, rotated back

Bases are orthogonal, so Frobenius norms do not change: root mean squares, bounds and correlations
keep their meaning. All functions take batches of matrices ``(b, r, c)`` with bases ``(b, r, r)`` and
``(b, c, c)``; ``None`` stands for a side that is not rotated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_optim.rules._context import State

#: Entries of a rotated matrix's state: bases, covariances, and the number of gradients they have
#: seen, ``()`` int64 on the CPU, because it says when a basis is refreshed.
KEYS = ("row_basis", "col_basis", "row_cov", "col_cov", "basis_age")
#: Entries of a rotated matrix's state that live in its bases: two momenta and the mean square.
MOMENTS = ("fast", "slow", "square")

# Finite gradients are cut off here: their squares, which rules average, fit into float32 even when
# summed over a tensor of two thousand million coordinates.
LARGEST_GRAD = 2.0**48
COVARIANCE_BETA = 0.98  # fifty gradients
LONGEST_SIDE = 1024  # beyond it a QR takes longer than a batch's gradient
LONGEST_RATIO = 4.0  # of an oblong matrix only the shorter side: the longer has most of the cost
SHORTEST_SIDE = 2
FIRST_ITERATIONS = 3  # of subspace iteration at the first gradient, from the identity
FRESH_AGE = 5  # bases of this age are refreshed at every step, older ones at a fifth of their age
LONGEST_PERIOD = 32  # steps between two refreshes
_SHIFT = 1e-6  # share of the old basis in the new one: directions without a gradient stay
_TINY = 1e-30  # squares of gradients below 1e-15 count as zero


# ---- which sides, and when


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of two dimensions or more; kernels are rows x the rest."""
    return shape[0], math.prod(shape[1:])


def rotated_sides(shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether the rows and the columns of a tensor of this shape are rotated."""
    if len(shape) < 2:
        return False, False
    rows, cols = matrix_shape(shape)
    short, long = min(rows, cols), max(rows, cols)
    if not SHORTEST_SIDE <= short <= LONGEST_SIDE:
        return False, False
    both = long <= LONGEST_SIDE and long <= LONGEST_RATIO * short
    return both or rows == short, both or cols < rows


def refresh_is_due(age: int, stagger: int = 0) -> bool:
    """Whether a basis that has seen ``age`` gradients is refreshed at the next one.

    Periods are powers of two, about a fifth of the age. ``stagger`` shifts them, so that the
    matrices of a network are not all refreshed in the same step.
    """
    period = 1 << max(0, min(LONGEST_PERIOD, age // FRESH_AGE).bit_length() - 1)
    return (age + stagger) % period == 0


def init_bases(
    shape: Sequence[int], sides: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> State:
    """Identity bases and zero covariances of the rotated sides; nothing if there is none."""
    state: State = {}
    if any(sides):
        for name, size, rotated in zip(("row", "col"), matrix_shape(shape), sides, strict=True):
            if rotated:
                state[f"{name}_basis"] = torch.eye(size, dtype=dtype, device=device)
                state[f"{name}_cov"] = torch.zeros(size, size, dtype=dtype, device=device)
        state["basis_age"] = torch.zeros((), dtype=torch.int64, device="cpu")
    return state


# ---- the algorithm


def rotate(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``Q_L^T x Q_R``, ``(b, r, c)``."""
    x = x if rows is None else rows.mT @ x
    return x if cols is None else x @ cols


def rotate_back(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``Q_L x Q_R^T``, ``(b, r, c)``."""
    x = x if rows is None else rows @ x
    return x if cols is None else x @ cols.mT


def accumulate_(cov: Tensor, factor: Tensor, ages: Sequence[int]) -> None:
    """Add ``factor @ factor^T`` to running covariances, in place.

    A plain mean of the first gradients, then an exponential one.

    Args:
        cov: ``(b, n, n)``.
        factor: gradients, ``(b, n, k)``.
        ages: gradients that each covariance has seen.
    """
    shares = [max(1 - COVARIANCE_BETA, 1 / (age + 1)) for age in ages]
    if len({*shares}) == 1:
        torch.baddbmm(cov, factor, factor.mT, beta=1 - shares[0], alpha=shares[0], out=cov)
    else:
        share = cov.new_tensor(shares)[:, None, None]
        cov.lerp_(factor @ factor.mT, share)


def next_basis(basis: Tensor, cov: Tensor) -> Tensor:
    """One step of subspace iteration, ``qr(cov @ basis)``.

    Columns keep their sign, and directions without a gradient stay: a basis that has converged
    does not change.
    """
    mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=_TINY)[..., None, None]
    turned, triangle = torch.linalg.qr(cov @ basis / mean + _SHIFT * basis)
    sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return turned * sign[..., None, :]


def carry_over_(
    momenta: Sequence[Tensor], square: Tensor, turns: Sequence[Tensor | None], bounds: Sequence[float]
) -> None:  # fmt: skip
    """Rotate momenta into new bases, in place, and raise the mean square to what they ask.

    A momentum is at most ``bound`` times the root of the mean square of the same gradients. The
    mean square itself cannot be rotated, so the bound on a step would break without the raise.

    Args:
        momenta: each ``(b, r, c)``.
        square: mean square, ``(b, r, c)``.
        turns: ``Q_new^T Q_old`` of rows and columns.
        bounds: of each momentum.
    """
    for momentum, bound in zip(momenta, bounds, strict=True):
        momentum.copy_(rotate_back(momentum, *turns))
        torch.maximum(square, (momentum / bound).square(), out=square)


# ---- one step of all rotated matrices


@dataclass
class _Group:
    """Matrices of one shape that are rotated together.

    Attributes:
        indices: of the tensors in the step.
        shape: ``(b, r, c)``.
        bases: of rows and columns.
        covs: of rows and columns.
    """

    indices: list[int]
    shape: tuple[int, int, int]
    bases: list[_Stack | None]
    covs: list[_Stack | None]


class _Stack:
    """Equal tensors as one batch ``(b, ...)``: a view where they lie side by side, else a copy."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        first, size = tensors[0], tensors[0].numel() * tensors[0].element_size()
        start = first.data_ptr() if _has_memory(first) else 0
        self._is_view = len(tensors) == 1 or (
            start != 0
            and all(t.is_contiguous() for t in tensors)
            and [t.data_ptr() for t in tensors] == [start + size * i for i in range(len(tensors))]
            and first.untyped_storage().data_ptr() == tensors[-1].untyped_storage().data_ptr()
        )
        if len(tensors) == 1:
            self.value = first.unsqueeze(0)
        elif self._is_view:
            shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
            self.value = first.as_strided(shape, strides)
        else:
            self.value = torch.stack(list(tensors))

    def store(self) -> None:
        """Write the batch back, where it is a copy."""
        if not self._is_view:
            torch._foreach_copy_(list(self._tensors), list(self.value.unbind()))


class Rotation:
    """The rotated matrices among the tensors of a step.

    Args:
        params: real tensors, of which those whose state has a ``basis_age`` are rotated.
        states: of the tensors, with their moments ``fast``, ``slow`` and ``square``.
        bounds: of the fast and the slow momentum, in roots of the mean square.
        staggers: of each tensor, see :func:`refresh_is_due`; its index if not given.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        bounds: tuple[float, float],
        staggers: Sequence[int] | None = None,
    ) -> None:
        self._states, self._bounds = states, bounds
        self._staggers = range(len(params)) if staggers is None else staggers
        self._updates: list[Tensor] = []  # of every group, between rotating and rotating back
        found: dict[object, list[int]] = {}
        for index, (param, state) in enumerate(zip(params, states, strict=True)):
            if "basis_age" in state:
                sides = "row_basis" in state, "col_basis" in state
                key = matrix_shape(param.shape), sides, param.device, param.dtype
                found.setdefault(key, []).append(index)
        self._groups = [self._group(indices, params[indices[0]]) for indices in found.values()]

    def _group(self, indices: list[int], param: Tensor) -> _Group:
        own = [self._states[index] for index in indices]

        def stack(key: str) -> _Stack | None:
            return _Stack([state[key] for state in own]) if key in own[0] else None

        return _Group(
            indices,
            (len(indices), *matrix_shape(param.shape)),
            [stack("row_basis"), stack("col_basis")],
            [stack("row_cov"), stack("col_cov")],
        )

    def rotate(
        self, params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Take in the gradients, refresh bases that are due, and rotate.

        Args:
            params: of the step, any floating dtype.
            grads: raw gradients, of the same shapes.

        Returns:
            ``(params, grads, updates)`` for the rule. In the places of rotated matrices these are
            the parameter, float32 or wider; the rotated gradient, of the same dtype; and memory
            for the rotated update, in the dtype of the bases. Elsewhere they are the arguments,
            and ``None``.
        """
        self._updates = []
        wide, seen = list(params), list(grads)
        updates: list[Tensor | None] = [None] * len(params)
        for group in self._groups:
            dtype = next(basis for basis in group.bases if basis is not None).value.dtype
            raw = _Stack([grads[index].reshape(group.shape[1:]) for index in group.indices]).value
            grad = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
            grad = grad.clamp_(-LARGEST_GRAD, LARGEST_GRAD)
            self._take_in(group, grad)
            turned = rotate(grad, *map(_value, group.bases)).contiguous()
            self._updates.append(torch.empty_like(turned))
            for index, own, update in zip(
                group.indices, turned.unbind(), self._updates[-1].unbind(), strict=True
            ):
                param = params[index]
                wide[index] = param.to(torch.promote_types(param.dtype, torch.float32))
                seen[index] = own.view(param.shape).to(wide[index].dtype)
                updates[index] = update.view(param.shape)
        return wide, seen, updates

    def rotate_back(self, params: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
        """Add the updates to the parameters; ``wide`` is what :meth:`rotate` returned."""
        for group, updates in zip(self._groups, self._updates, strict=True):
            steps = rotate_back(updates, *map(_value, group.bases))
            for index, step in zip(group.indices, steps.unbind(), strict=True):
                param = params[index]
                total = wide[index].add_(step.view(param.shape))
                if total is not param:
                    param.copy_(total)

    def _take_in(self, group: _Group, grad: Tensor) -> None:
        """Update the covariances of a group by gradients ``(b, r, c)``; refresh what is due."""
        ages = [_age(self._states[index]) for index in group.indices]
        for cov, factor in zip(group.covs, (grad, grad.mT), strict=True):
            if cov is not None:
                accumulate_(cov.value, factor, ages)
                cov.store()
        due = [
            i for i, age in enumerate(ages) if refresh_is_due(age, self._staggers[group.indices[i]])
        ]
        if due:
            self._refresh(group, due, [ages[i] == 0 for i in due])
        torch._foreach_add_([self._states[index]["basis_age"] for index in group.indices], 1)

    def _refresh(self, group: _Group, due: list[int], fresh: list[bool]) -> None:
        """New bases of some matrices of a group; ``fresh`` ones have no momenta so far."""
        turns: list[Tensor | None] = []
        for basis, cov in zip(group.bases, group.covs, strict=True):
            if basis is None or cov is None:
                turns.append(None)
                continue
            old, own = basis.value[due], cov.value[due]
            new = next_basis(old, own)
            if all(fresh):
                for _ in range(FIRST_ITERATIONS - 1):
                    new = next_basis(new, own)
            turns.append(new.mT @ old)
            basis.value[due] = new
            basis.store()
        if all(fresh):
            return
        states = [self._states[group.indices[i]] for i in due]
        dtype = next(turn for turn in turns if turn is not None).dtype
        moments = []
        for key in MOMENTS:
            own = torch.stack([state[key].reshape(group.shape[1:]) for state in states])
            moments.append(own.to(dtype))
        carry_over_(moments[:2], moments[2], turns, self._bounds)
        for key, value in zip(MOMENTS, moments, strict=True):
            for state, new in zip(states, value.unbind(), strict=True):
                state[key].copy_(new.view(state[key].shape))


def _value(stack: _Stack | None) -> Tensor | None:
    return None if stack is None else stack.value


def _has_memory(tensor: Tensor) -> bool:
    """False for fake tensors and tensors on the meta device, whose values cannot be read."""
    return tensor.device.type != "meta" and not hasattr(tensor, "fake_mode")


def _age(state: State) -> int:
    """Gradients that the bases have seen; 1, so that nothing is refreshed, if it has no value."""
    age = state["basis_age"]
    return int(age) if _has_memory(age) else 1
