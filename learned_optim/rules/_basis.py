"""The eigenbasis of a matrix: rotation, covariances, refresh.

A rule reads a gradient matrix ``G`` in coordinates in which its entries are least correlated, the
basis of SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3):

    L <- lerp(L, G G^T),  R <- lerp(R, G^T G)    running covariances of the rotated sides
    Q_L <- qr(L Q_L),     Q_R <- qr(R Q_R)       refresh: one step of subspace iteration
    g = Q_L^T G Q_R                              what the rule reads; its moments live here
    W <- W + Q_L u Q_R^T                         the rule's update u, rotated back

Bases are orthogonal, so Frobenius norms do not change: root mean squares, bounds and correlations
keep their meaning. All functions take batches of matrices ``(b, r, c)`` with bases ``(b, r, r)``
and ``(b, c, c)``; ``None`` stands for a side that is not rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from learned_optim._tensors import has_values, lie_side_by_side
from learned_optim.kernels import constants as c
from learned_optim.rules._step import State

#: State entries of a rotated matrix: bases, covariances, and the number of gradients so far,
#: ``(1, 1)``. That one is on the CPU, because it decides when a basis is refreshed.
KEYS = ("row_basis", "col_basis", "row_cov", "col_cov", "basis_age")
#: State entries in the coordinates of the bases: two momenta and the mean square.
MOMENTS = ("fast", "slow", "square")

COVARIANCE_BETA = 0.9  # a mean of ten gradients
LONGEST_SIDE = 1024  # beyond it a QR takes longer than a batch's gradient
# Beyond these ratios of sides only the shorter one is rotated: the longer has most of the cost.
LONGEST_RATIO = 4.0
KERNEL_RATIO = 10.0  # of convolutions: 3x3 kernels have nine columns per input channel
SHORTEST_SIDE = 2
FEWEST_ROUNDED = 1 << 20  # multiplications of a product; in smaller ones rounding costs more
FIRST_ITERATIONS = 3  # of subspace iteration at the first gradient, from the identity
FRESH_AGE = 5  # bases of this age are refreshed at every step, older ones at a fifth of their age
LONGEST_PERIOD = 32  # steps between two refreshes
WINDOW = 8  # gradients before a refresh that enter the covariances: best of 4 to 32
_SHIFT = 1e-4  # share of the old basis in the new one: directions without a gradient stay


# ---- which sides, and when


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor; dimensions after the first are columns."""
    return shape[0], math.prod(shape[1:])


def rotated_sides(shape: Sequence[int]) -> tuple[bool, bool]:
    """True for rows and for columns if the rule rotates them."""
    if len(shape) < 2:
        return False, False
    rows, cols = matrix_shape(shape)
    short, long = min(rows, cols), max(rows, cols)
    if not SHORTEST_SIDE <= short <= LONGEST_SIDE:
        return False, False
    ratio = KERNEL_RATIO if len(shape) > 2 else LONGEST_RATIO
    both = long <= LONGEST_SIDE and long <= ratio * short
    return both or rows == short, both or cols < rows


def refresh_period(age: int) -> int:
    """Steps between refreshes: a power of two, about a fifth of the age."""
    return 1 << max(0, min(LONGEST_PERIOD, age // FRESH_AGE).bit_length() - 1)


def refresh_is_due(age: int, stagger: int = 0) -> bool:
    """True if a basis of ``age`` gradients is refreshed at the next one.

    ``stagger`` shifts the periods, so that the matrices of a network are not all refreshed in the
    same step.
    """
    return (age + stagger) % refresh_period(age) == 0


def refresh_is_near(age: int, stagger: int = 0) -> bool:
    """True if the next refresh is fewer than :data:`WINDOW` gradients away.

    That is while the stagger, the place among tensors with a gradient, stays the same.
    """
    period = refresh_period(age)
    return -(age + stagger) % period < WINDOW


def init_bases(
    shape: Sequence[int], sides: tuple[bool, bool], dtype: torch.dtype, device: torch.device
) -> State:
    """Identity bases and zero covariances of the rotated sides, if any."""
    state: State = {}
    if any(sides):
        for name, size, rotated in zip(("row", "col"), matrix_shape(shape), sides, strict=True):
            if rotated:
                state[f"{name}_basis"] = torch.eye(size, dtype=dtype, device=device)
                state[f"{name}_cov"] = torch.zeros(size, size, dtype=dtype, device=device)
        where = "meta" if device.type == "meta" else "cpu"
        state["basis_age"] = torch.zeros(1, 1, dtype=torch.float32, device=where)
    return state


# ---- the algorithm


def rotate(x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``Q_L^T x Q_R``, ``(b, r, c)``."""
    x = x if rows is None else rows.mT @ x
    return x if cols is None else x @ cols


def rotate_grad(grad: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """A finite gradient ``(b, r, c)``, rotated, with rounding errors set to zero."""
    return without_rounding(rotate(grad, rows, cols), grad)


def without_rounding(turned: Tensor, before: Tensor) -> Tensor:
    """``turned`` with entries below the rotation's rounding error set to zero, in place.

    Steps do not depend on the size of gradients. So rounding errors would move a direction without
    a gradient as far as any other.

    Args:
        turned: rotated gradients or momenta, ``(b, r, c)``.
        before: the same before the rotation.
    """
    norm = torch.linalg.vector_norm(before, dim=(-2, -1), keepdim=True)
    error = 4 * torch.finfo(before.dtype).eps * norm
    return turned.masked_fill_(turned.abs() < error, 0.0)


def rotate_back(
    x: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """``Q_L x Q_R^T``, ``(b, r, c)``."""
    x = x if rows is None else product(rows, x)
    return x if cols is None else product(x, cols.mT)


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, of rounded matrices if these are large and the device multiplies bfloat16 faster.

    For updates. With rounded gradients or covariances a direction without a gradient would have
    one of rounding errors, and be stepped as far as any other.
    """
    multiplications = a.shape[-2] * a.shape[-1] * b.shape[-1]
    if (
        a.dtype != torch.float32
        or multiplications < FEWEST_ROUNDED
        or not multiplies_bfloat16(a.device)
    ):
        return a @ b
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the device is known to have units that multiply bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    # torch before 2.10 does not say what the processor has
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(known.get(f"{unit}_bf16") for unit in ("avx512", "amx"))


# A constant of torch.compile's graph, as in `kernels/_operator.py`.
multiplies_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def accumulate_(cov: Tensor, factor: Tensor, ages: Sequence[int]) -> None:
    """Add ``factor @ factor^T`` to running covariances, in place.

    The mean of the first ten gradients is plain, then it is exponential.

    Args:
        cov: ``(b, n, n)``.
        factor: gradients, ``(b, n, k)``.
        ages: gradients that each matrix has had.
    """
    product = factor @ factor.mT
    shares = [max(1 - COVARIANCE_BETA, 1 / (age + 1)) for age in ages]
    same = len({*shares}) == 1
    cov.lerp_(product, shares[0] if same else cov.new_tensor(shares)[:, None, None])


def next_basis(basis: Tensor, cov: Tensor) -> Tensor:
    """One step of subspace iteration, ``qr(cov @ basis)``.

    Columns keep their sign, and directions without a gradient stay: a basis that has converged
    does not change.
    """
    mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=c.TINY**2)[..., None, None]
    turned, triangle = torch.linalg.qr(cov @ basis / mean + _SHIFT * basis)
    sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(turned.dtype)
    return turned * sign[..., None, :]


def carry_over_(
    momenta: Sequence[Tensor],
    square: Tensor,
    turns: Sequence[Tensor | None],
    bounds: Sequence[float],
) -> None:
    """Rotate momenta into new bases, in place; raise the mean square to their bounds.

    A momentum is at most ``bound`` times the root of the mean square of the same gradients. The
    mean square itself cannot be rotated: without the raise the bound on a step would break.

    Args:
        momenta: each ``(b, r, c)``.
        square: mean square, ``(b, r, c)``.
        turns: ``Q_new^T Q_old`` of rows and columns.
        bounds: of each momentum.
    """
    rows, cols = turns
    for momentum, bound in zip(momenta, bounds, strict=True):
        momentum.copy_(without_rounding(rotate_back(momentum, rows, cols), momentum))
        torch.maximum(square, (momentum / bound).square(), out=square)


# ---- one step of all rotated matrices


@dataclass
class _Group:
    """Matrices of one shape that are rotated together.

    Attributes:
        indices: of the tensors in the step.
        shape: ``(b, r, c)``.
        sides: basis and covariance of rows, ``(b, r, r)``, and of columns, ``(b, c, c)``; ``None``
            if not rotated.
        updates: memory for the rotated updates, ``(b, r, c)``.
    """

    indices: list[int]
    shape: tuple[int, int, int]
    sides: list[tuple[_Batch, _Batch] | None]
    updates: Tensor

    @property
    def rotation(self) -> tuple[Tensor | None, Tensor | None]:
        rows, cols = (None if side is None else side[0].value for side in self.sides)
        return rows, cols


class _Batch:
    """Tensors of one shape as a batch ``(b, ...)``.

    It is a view if they lie side by side in memory, else a copy, which :meth:`load` reads again and
    :meth:`store` writes back.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._is_view = list(tensors), True
        first = tensors[0]
        if len(tensors) == 1:
            self.value = first.unsqueeze(0)
        elif lie_side_by_side(tensors):
            shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
            self.value = first.as_strided(shape, strides)
        else:
            self.value, self._is_view = torch.stack(self._tensors), False

    def load(self) -> None:
        """Read the tensors, to which others may have written."""
        if not self._is_view:
            torch._foreach_copy_(list(self.value.unbind()), self._tensors)

    def store(self) -> None:
        """Write the batch to the tensors."""
        if not self._is_view:
            torch._foreach_copy_(self._tensors, list(self.value.unbind()))


class Rotation:
    """The rotated matrices among the tensors of a step.

    Args:
        params: real tensors, of which those whose state has a ``basis_age`` are rotated.
        states: of the tensors.
        bounds: of the fast and the slow momentum, in roots of the mean square.
        staggers: of each tensor, see :func:`refresh_is_due`; its index if not given.

    Attributes:
        wide: the parameters as the rule steps them: rotated ones of half precision in float32.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        bounds: tuple[float, float],
        staggers: Sequence[int] | None = None,
    ) -> None:
        self._params, self._states, self._bounds = params, states, bounds
        self._staggers = range(len(params)) if staggers is None else staggers
        self.wide = list(params)
        found: dict[object, list[int]] = {}
        for index, (param, state) in enumerate(zip(params, states, strict=True)):
            if "basis_age" in state:
                sides = "row_basis" in state, "col_basis" in state
                key = matrix_shape(param.shape), sides, param.device, param.dtype
                found.setdefault(key, []).append(index)
                self.wide[index] = param.to(torch.promote_types(param.dtype, torch.float32))
        self._groups = [self._group(own, params) for own in found.values()]
        self._entries = [state[key] for state in states for key in KEYS if key in state]
        self._addresses = list(map(_address, self._entries))

    def is_current(self) -> bool:
        """False if bases or covariances have been moved in memory since."""
        return list(map(_address, self._entries)) == self._addresses

    def _group(self, indices: list[int], params: Sequence[Tensor]) -> _Group:
        own = [self._states[index] for index in indices]
        shape = len(indices), *matrix_shape(params[indices[0]].shape)
        sides: list[tuple[_Batch, _Batch] | None] = [None, None]
        for place, keys in enumerate((("row_basis", "row_cov"), ("col_basis", "col_cov"))):
            if keys[0] in own[0]:
                basis, cov = (_Batch([state[key] for state in own]) for key in keys)
                sides[place] = basis, cov
                updates = basis.value.new_empty(shape)
        return _Group(indices, shape, sides, updates)

    def rotate(self, grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Update covariances by raw gradients, refresh bases that are due, and rotate.

        Returns:
            ``(grads, updates)`` for a step of the tensors in :attr:`wide`. In the places of rotated
            matrices these are the rotated gradient, in the parameter's dtype there, and memory for
            the rotated update, in that of the bases; elsewhere the raw gradient, and ``None``.
        """
        seen: list[Tensor] = list(grads)
        updates: list[Tensor | None] = [None] * len(grads)
        for group in self._groups:
            raw = _Batch([grads[index].reshape(group.shape[1:]) for index in group.indices]).value
            grad = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0).to(group.updates.dtype)
            grad = grad.clamp_(-c.LARGEST_GRAD, c.LARGEST_GRAD)
            for batch in chain.from_iterable(filter(None, group.sides)):
                batch.load()
            self._update_bases(group, grad)
            if grad.device.type != "cpu":  # where the rate is 0 the kernel writes no updates
                group.updates.zero_()
            turned = rotate_grad(grad, *group.rotation).contiguous()
            for index, own, update in zip(
                group.indices, turned.unbind(), group.updates.unbind(), strict=True
            ):
                param, wide = self._params[index], self.wide[index]
                if wide is not param:
                    wide.copy_(param)
                seen[index] = own.view(param.shape).to(wide.dtype)
                updates[index] = update.view(param.shape)
        return seen, updates

    def rotate_back(self) -> None:
        """Add the updates, rotated back, to the parameters."""
        for group in self._groups:
            steps = rotate_back(group.updates, *group.rotation, rounded_product)
            for index, step in zip(group.indices, steps.unbind(), strict=True):
                param, wide = self._params[index], self.wide[index]
                wide.add_(step.view(param.shape))
                if wide is not param:
                    param.copy_(wide)

    def _update_bases(self, group: _Group, grad: Tensor) -> None:
        """Update the covariances of a group by gradients ``(b, r, c)``; refresh what is due."""
        ages = [_age(self._states[index]) for index in group.indices]
        phases = [(age, self._staggers[i]) for age, i in zip(ages, group.indices, strict=True)]
        near = [i for i, phase in enumerate(phases) if refresh_is_near(*phase)]
        due = [i for i, phase in enumerate(phases) if refresh_is_due(*phase)]
        for side, factor in zip(group.sides, (grad, grad.mT), strict=True):
            if side is not None:
                for run in _runs(near):
                    accumulate_(side[1].value[run], factor[run], ages[run])
                side[1].store()
        for fresh in (True, False):
            chosen = [i for i in due if (ages[i] == 0) is fresh]
            if chosen:
                self._refresh(group, chosen, fresh)
        torch._foreach_add_([self._states[index]["basis_age"] for index in group.indices], 1)

    def _refresh(self, group: _Group, due: list[int], fresh: bool) -> None:
        """Refresh bases of some matrices of a group; ``fresh``: they have no momenta so far."""
        turns: list[Tensor | None] = []
        for side in group.sides:
            if side is None:
                turns.append(None)
                continue
            basis, cov = side
            old, own = basis.value[due], cov.value[due]
            new = old
            for _ in range(FIRST_ITERATIONS if fresh else 1):
                new = next_basis(new, own)
            turns.append(new.mT @ old)
            basis.value[due] = new
            basis.store()
        if fresh:
            return
        states = [self._states[group.indices[i]] for i in due]
        moments = []
        for key in MOMENTS:
            values = [state[key].reshape(group.shape[1:]) for state in states]
            moments.append(torch.stack(values).to(group.updates.dtype))
        carry_over_(moments[:2], moments[2], turns, self._bounds)
        for key, value in zip(MOMENTS, moments, strict=True):
            for state, carried in zip(states, value.unbind(), strict=True):
                state[key].copy_(carried.view(state[key].shape))


def _runs(indices: Sequence[int]) -> Iterator[slice]:
    """Increasing indices as slices of consecutive ones."""
    for _, pairs in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        own = [index for _, index in pairs]
        yield slice(own[0], own[-1] + 1)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if has_values(tensor) else 0


def _age(state: State) -> int:
    """Number of gradients so far; 1 for fake tensors."""
    age = state["basis_age"]
    return int(age) if has_values(age) else 1
