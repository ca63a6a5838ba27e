"""The step in place of the horizon rule: rotation of matrices around a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from learned_optim import kernels
from learned_optim._ambient import plain_arithmetic
from learned_optim.kernels import constants as c
from learned_optim.rules._base import UpdateRule
from learned_optim.rules._basis import Rotation
from learned_optim.rules._basis_operator import TracedRotation
from learned_optim.rules._context import Shards, State, StepFunction, StepSettings
from learned_optim.rules._features import largest_momentum
from learned_optim.rules._step import restore_where_zero_, states_before

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
            groups = () if shards is None else shards.groups
            rotation: Rotation | TracedRotation = (
                TracedRotation(params, states, self.momentum_bounds)
                if torch.compiler.is_compiling()
                else Rotation(params, states, self.momentum_bounds, None, groups)
            )
            before = states_before(settings.lr, states, (*self.state_keys, *self.matrix_state))
            seen, updates = rotation.rotate(grads)
            self.step_(rotation.wide, seen, states, settings, shards, updates)
            rotation.rotate_back()
            restore_where_zero_(settings.lr, states, before)
            return
        whole = shards is None or not shards.groups
        tensors = params, grads, states, settings
        if not (whole and kernels.step_(self.network(), *tensors, updates)):
            super().step_(*tensors, shards, updates)

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
