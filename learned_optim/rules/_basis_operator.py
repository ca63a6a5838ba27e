"""The rotation of gradients as an operator that graphs of torch.compile call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim.rules._basis import MOMENTS, Rotation, matrix_shape, rotate_back
from learned_optim.rules._context import State

_SIDES = ("row", "col")


def _rotate_(
    grads: list[Tensor],
    turned: list[Tensor],
    bases: list[Tensor],
    covs: list[Tensor],
    sides: list[int],
    ages: list[Tensor],
    fast: list[Tensor],
    slow: list[Tensor],
    square: list[Tensor],
    bounds: list[float],
    staggers: list[int],
) -> None:
    states: list[State] = [
        {"basis_age": age, **dict(zip(MOMENTS, moments, strict=True))}
        for age, *moments in zip(ages, fast, slow, square, strict=True)
    ]
    for place, basis, cov in zip(sides, bases, covs, strict=True):
        index, side = divmod(place, 2)
        states[index] |= {f"{_SIDES[side]}_basis": basis, f"{_SIDES[side]}_cov": cov}
    low, high = bounds
    rotation = Rotation(grads, states, (low, high), staggers)
    for out, own in zip(turned, rotation.rotate(grads)[0], strict=True):
        out.copy_(own)


_operator: Any = torch.library.custom_op(
    "learned_optim::rotate_",
    _rotate_,
    mutates_args=("turned", "bases", "covs", "ages", "fast", "slow", "square"),
    schema="(Tensor[] grads, Tensor(g!)[] turned, Tensor(a!)[] bases, Tensor(b!)[] covs, "
    "int[] sides, Tensor(c!)[] ages, Tensor(d!)[] fast, Tensor(e!)[] slow, Tensor(f!)[] square, "
    "float[] bounds, int[] staggers) -> ()",
)


_operator.register_fake(lambda *_: None)


class TracedRotation:
    """:class:`Rotation` while a graph is traced: one operator, and products in the graph."""

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[State], bounds: tuple[float, float]
    ) -> None:
        self._params, self._bounds = params, bounds
        self._indices = [index for index, state in enumerate(states) if "basis_age" in state]
        self._own = [states[index] for index in self._indices]
        self._updates: list[Tensor] = []
        self.wide = list(params)
        for index in self._indices:
            kind = torch.promote_types(params[index].dtype, torch.float32)
            self.wide[index] = params[index].to(kind)

    def rotate(self, grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """See :meth:`Rotation.rotate`."""
        places = [
            (2 * place + side, state[f"{name}_basis"], state[f"{name}_cov"])
            for place, state in enumerate(self._own)
            for side, name in enumerate(_SIDES)
            if f"{name}_basis" in state
        ]
        moments = ([state[key] for state in self._own] for key in MOMENTS)
        turned = [torch.empty_like(self.wide[index]) for index in self._indices]
        _operator(
            [grads[index] for index in self._indices],
            turned,
            [basis for _, basis, _ in places],
            [cov for _, _, cov in places],
            [place for place, _, _ in places],
            [state["basis_age"] for state in self._own],
            *moments,
            list(self._bounds),
            list(self._indices),
        )
        seen: list[Tensor] = list(grads)
        updates: list[Tensor | None] = [None] * len(grads)
        for index, own, state in zip(self._indices, turned, self._own, strict=True):
            seen[index] = own
            kind = next(state[key].dtype for key in ("row_basis", "col_basis") if key in state)
            updates[index] = torch.empty_like(own, dtype=kind)
        self._updates = [update for update in updates if update is not None]
        return seen, updates

    def rotate_back(self) -> None:
        """See :meth:`Rotation.rotate_back`."""
        for index, update, state in zip(self._indices, self._updates, self._own, strict=True):
            param, wide = self._params[index], self.wide[index]
            matrix = update.reshape(matrix_shape(param.shape))
            step = rotate_back(matrix, state.get("row_basis"), state.get("col_basis"))
            wide.add_(step.reshape(param.shape))
            if wide is not param:
                param.copy_(wide)
