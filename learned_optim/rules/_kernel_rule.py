"""The step in place of the horizon rule: rotation of matrices around a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from learned_optim import kernels
from learned_optim._ambient import plain_arithmetic
from learned_optim.kernels import StepSettings
from learned_optim.kernels import constants as c
from learned_optim.rules._base import UpdateRule
from learned_optim.rules._basis import MOMENTS, Rotation, matrix_shape, rotate_back, rounded_product
from learned_optim.rules._features import largest_momentum
from learned_optim.rules._step import (
    Shards,
    State,
    StepFunction,
    restore_where_zero_,
    states_before,
)

_shape_of = attrgetter("shape")


class KernelRule(UpdateRule):
    """A rule with layers ``hidden``, ``readout`` and ``direct``, whose step the kernels know."""

    @property
    def momentum_bounds(self) -> tuple[float, float]:
        """Bounds of the fast and the slow momentum in roots of the mean square."""
        return (
            largest_momentum(c.FAST_BETA, c.SQUARE_BETA),
            largest_momentum(c.SLOW_BETA, c.SQUARE_BETA),
        )

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        settings: StepSettings = StepSettings(),  # noqa: B008 (a tuple)
        shards: Shards | None = None,
        updates: Sequence[Tensor | None] | None = None,
    ) -> None:
        """See :meth:`UpdateRule.step_`: by the device's kernel where possible, else the pure form.

        Matrices with bases are rotated here. A caller that passes ``updates`` has rotated them.
        """
        if updates is None and any("basis_age" in state for state in states):
            kind = TracedRotation if torch.compiler.is_compiling() else Rotation
            rotation = kind(params, states, self.momentum_bounds)
            self.step_rotated_(rotation, grads, states, settings)
            return
        whole = shards is None or not shards.groups
        tensors = params, grads, states, settings
        if not (whole and kernels.step_(self.network(), *tensors, updates)):
            super().step_(*tensors, shards, updates)

    def step_rotated_(
        self,
        rotation: Rotation | TracedRotation,
        grads: Sequence[Tensor],
        states: Sequence[State],
        settings: StepSettings,
    ) -> None:
        """:meth:`step_` of the tensors of a rotation, which have these gradients and states."""
        before = states_before(settings.lr, states, (*self.state_keys, *self.matrix_state))
        seen, updates = rotation.rotate(grads)
        self.step_(rotation.wide, seen, states, settings, None, updates)
        rotation.rotate_back()
        restore_where_zero_(settings.lr, states, before)

    def bind(self, params: Sequence[Tensor], states: Sequence[State]) -> StepFunction | None:
        """See :meth:`UpdateRule.bind`: a call of the CPU's kernel."""
        if getattr(self.step_, "__func__", None) is not KernelRule.step_:
            return None  # overridden, and a bound step would go past it
        rotation = self.rotation(params, states)
        wide = params if rotation is None else rotation.wide
        bound = kernels.bind(self.network(), wide, states)
        if bound is None or rotation is None:
            return bound
        shapes = list(map(_shape_of, params))

        def rotated(grads: Sequence[Tensor], settings: StepSettings) -> bool:
            fit = kernels.are_plain(grads) and list(map(_shape_of, grads)) == shapes
            if not (fit and rotation.is_current()) or kernels.under_a_mode():
                return False
            with plain_arithmetic("cpu"):
                seen, updates = rotation.rotate(grads)
                if not bound(seen, settings, updates):
                    self.step_(wide, seen, states, settings, None, updates)
                rotation.rotate_back()
            return True

        return rotated

    def rotation(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        staggers: Sequence[int] | None = None,
    ) -> Rotation | None:
        """The rotation of these tensors; ``None`` if none of them has a basis."""
        if not any("basis_age" in state for state in states):
            return None
        return Rotation(params, states, self.momentum_bounds, staggers)

    def network(self) -> list[Tensor]:
        """All weights in the kernels' order."""
        layers: Any = self.hidden, self.readout, self.direct
        hidden, readout, direct = layers
        return [hidden.weight, hidden.bias, readout.weight, readout.bias, direct.weight]


# ---- the rotation in graphs of torch.compile

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
            bases = state.get("row_basis"), state.get("col_basis")
            step = rotate_back(matrix, *bases, rounded_product)
            wide.add_(step.reshape(param.shape))
            if wide is not param:
                param.copy_(wide)
