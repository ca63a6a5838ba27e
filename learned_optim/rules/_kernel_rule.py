"""The step in place of the horizon rule: rotation of matrices around a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim import kernels
from learned_optim._ambient import plain_arithmetic
from learned_optim.rules._base import UpdateRule
from learned_optim.rules._basis import Rotation
from learned_optim.rules._basis_operator import TracedRotation
from learned_optim.rules._context import BoundStep, State, StepSettings
from learned_optim.rules._step import needs_sync, reference_step_

_PLAIN = {Tensor, nn.Parameter}
_shape_of = attrgetter("shape")


class KernelRule(UpdateRule):
    """A rule with layers ``hidden``, ``readout`` and ``direct``, whose step the kernels know."""

    @property
    def momentum_bounds(self) -> tuple[float, float]:
        """Bounds of the fast and the slow momentum in roots of the mean square."""
        raise NotImplementedError

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        warmup: int = 0,
        loss: Tensor | None = None,
        total_steps: float | None = None,
        shapes: Sequence[torch.Size] | None = None,
        shard_groups: tuple[Any, ...] = (),
    ) -> None:
        """See :meth:`UpdateRule.step_`: the device's kernel where it can, else the pure form."""
        settings = StepSettings(lr, weight_decay, maximize, warmup, total_steps)
        if not any("basis_age" in state for state in states):
            self._step_(params, grads, states, settings, shapes, shard_groups)
            return
        rotation: Rotation | TracedRotation
        if torch.compiler.is_compiling():
            rotation = TracedRotation(params, states, self.momentum_bounds)
        else:
            rotation = Rotation(params, states, self.momentum_bounds, None, shard_groups)
        keys = (*self.state_keys, *self.matrix_state)
        saved: list[State] = []
        if needs_sync(lr):  # state must stay where lr is zero, which the device alone knows
            saved = [{k: s[k].clone() for k in keys if k in s} for s in states]
        seen, updates = rotation.rotate(grads)
        self._step_(rotation.wide, seen, states, settings, shapes, shard_groups, updates)
        rotation.rotate_back()
        for state, old in zip(states, saved, strict=False):
            for key, value in old.items():
                if isinstance(lr, Tensor) and lr.device == value.device:
                    state[key].copy_(torch.where(lr != 0, state[key], value))

    def _step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        settings: StepSettings,
        shapes: Sequence[torch.Size] | None,
        shard_groups: tuple[Any, ...],
        updates: Sequence[Tensor | None] | None = None,
    ) -> None:
        """The step of coordinates; updates of rotated matrices go to ``updates``."""
        if shard_groups or not kernels.step_(
            self._network(), params, grads, states, settings, shapes, updates
        ):
            reference_step_(
                self, params, grads, states, settings, None, shapes, shard_groups, updates
            )

    def bind_step(self, params: Sequence[Tensor], states: Sequence[State]) -> BoundStep | None:
        """See :meth:`UpdateRule.bind_step`: a call of the CPU's kernel."""
        if getattr(self.step_, "__func__", None) is not KernelRule.step_:
            return None  # overridden, and a bound step would go past it
        network, rotation = self._network(), self.rotation(params, states)
        bound = kernels.bind(network, params if rotation is None else rotation.wide, states)
        if bound is None:
            return None
        shapes = list(map(_shape_of, params))

        def step(
            grads: Sequence[Tensor | None],
            *,
            lr: float | Tensor,
            weight_decay: float,
            maximize: bool,
            warmup: int,
            total_steps: float | None,
        ) -> bool:
            if not all(map(is_, self._network(), network)):
                return False
            settings = StepSettings(lr, weight_decay, maximize, warmup, total_steps)
            raw: Any = grads
            if rotation is None:
                return bound(raw, settings)
            plain = {*map(type, raw)} <= _PLAIN and list(map(_shape_of, raw)) == shapes
            if not (plain and rotation.is_current() and bound.takes(settings)):
                return False
            with plain_arithmetic({"cpu"}):
                seen, updates = rotation.rotate(raw)
                if not bound(seen, settings, updates):
                    self._step_(rotation.wide, seen, states, settings, None, (), updates)
                rotation.rotate_back()
            return True

        return step

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

    def _network(self) -> list[Tensor]:
        """All weights in the kernel's order, without nn.Module's slow attribute access."""
        modules: Any = self._modules
        hidden, readout, direct = (
            modules[name]._parameters for name in ("hidden", "readout", "direct")
        )
        biased = [hidden["weight"], hidden["bias"], readout["weight"], readout["bias"]]
        return [*biased, direct["weight"]]
