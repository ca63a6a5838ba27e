"""The step in place of a rule that :mod:`learned_optim.kernels` has compiled."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from learned_optim import kernels
from learned_optim.rules._base import UpdateRule
from learned_optim.rules._basis import Rotation
from learned_optim.rules._context import BoundStep, State
from learned_optim.rules._features import largest_momentum
from learned_optim.rules._step import DECAY_UNIT, reference_step_


class KernelRule(UpdateRule):
    """A rule with layers ``hidden``, ``readout`` and ``direct``, whose step the kernels know."""

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
        """See :meth:`UpdateRule.step_`: the device's kernel where it can, else the pure form.

        Matrices with bases are stepped in them.
        """
        rotation, wide, updates = self.rotation(params, states), list(params), None
        if rotation is not None:
            wide, grads, updates = rotation.rotate(params, grads)
        if shard_groups or not kernels.step_(
            self._network(), wide, grads, states, config=self.kernel_config(), lr=lr,
            decay=DECAY_UNIT * weight_decay, maximize=maximize, warmup=warmup,
            total_steps=total_steps, shapes=shapes, updates=updates,
        ):  # fmt: skip
            reference_step_(
                self, wide, grads, states, lr=lr, weight_decay=weight_decay, maximize=maximize,
                warmup=warmup, loss=loss, total_steps=total_steps, shapes=shapes,
                shard_groups=shard_groups, updates=updates,
            )  # fmt: skip
        if rotation is not None:
            rotation.rotate_back(params, wide)

    def rotation(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        staggers: Sequence[int] | None = None,
    ) -> Rotation | None:
        """The rotation of these tensors; ``None`` if none of them has a basis."""
        if not any("basis_age" in state for state in states):
            return None
        cfg: Any = self.config
        betas = cfg.fast_beta, cfg.slow_beta
        fast, slow = (largest_momentum(beta, cfg.square_beta) for beta in betas)
        return Rotation(params, states, (fast, slow), staggers)

    def bind_step(self, params: Sequence[Tensor], states: Sequence[State]) -> BoundStep | None:
        """See :meth:`UpdateRule.bind_step`: a call of the CPU's kernel."""
        if getattr(self.step_, "__func__", None) is not KernelRule.step_:
            return None  # overridden, and a bound step would go past it
        network = self._network()
        bound = kernels.bind(network, params, states, config=self.kernel_config())
        if bound is None:
            return None

        def step(
            grads: Sequence[Tensor | None],
            *,
            lr: float | Tensor,
            weight_decay: float,
            maximize: bool,
            warmup: int,
            total_steps: float | None,
        ) -> bool:
            return all(map(is_, self._network(), network)) and bound(
                grads, lr, DECAY_UNIT * weight_decay, maximize, warmup, total_steps
            )

        return step

    def _network(self) -> list[Tensor]:
        """All weights in the kernel's order, without nn.Module's slow attribute access."""
        modules: Any = self._modules
        hidden, readout, direct = (
            modules[name]._parameters for name in ("hidden", "readout", "direct")
        )
        biased = [hidden["weight"], hidden["bias"], readout["weight"], readout["bias"]]
        return [*biased, direct["weight"]]

    def kernel_config(self) -> tuple[float, ...]:
        """What the kernel takes as ``config``."""
        cfg = self.config
        return (
            cfg.fast_beta, cfg.slow_beta, cfg.square_beta, cfg.base_step, cfg.largest_scale,
            cfg.smallest_share, cfg.warmup_share, cfg.warmup_steps, cfg.trust_start,
            cfg.trust_gain, cfg.trust_later_gain, cfg.trust_known_gain, cfg.trust_margin,
            cfg.trust_growth, cfg.decay_power, float(cfg.decay_live), cfg.adapter_power,
        )  # fmt: skip
