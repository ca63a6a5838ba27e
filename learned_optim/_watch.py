"""Warnings about the updates of a parameter group, each given once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learned_optim._groups import SUSPICIOUS_LR
from learned_optim._tensors import has_values
from learned_optim._views import local
from learned_optim._warn import warn_once
from learned_optim.rules import State, UpdateRule

FALLS_OF_A_SCHEDULE = 3  # updates with a falling learning rate that make a schedule
SHORT_SWA_LR = 0.5  # below it, swa_lr is taken for a learning rate of SGD or Adam
UPDATES_WITHOUT_GRADIENT = 5  # in a row, without a finite gradient entry: no single bad batch
GRADIENT_INTERVAL = 64  # updates between two looks at finite gradients

#: What a step is past, by kind of warning, of a number of steps and the rule's name.
ENDS = {
    "past": "total_steps={}: the rule {!r} holds the last rate. Construct the optimizer with the "
    "length of the whole run, or set param_groups[i]['total_steps']",
    "trained": "the {} steps of the longest runs that the update rule {!r} was meta-trained on. "
    "Longer ones may end worse than a tuned AdamW's: watch the loss",
}


class GroupWatch:
    """Warns of faults in the updates of one parameter group.

    A step counts ``updates``, calls :meth:`look` when ``due`` is reached and :meth:`fall` when the
    learning rate is below ``rate``, and pays nothing else.

    Args:
        rule: the optimizer's update rule.
        warned: kinds of warnings that the optimizer has given.

    Attributes:
        updates: number of the group's updates; an upper bound where gradients come and go.
        due: the update at which to look.
        rate: learning rate of the last update; NaN before the first one.
    """

    def __init__(self, rule: UpdateRule, warned: set[str]) -> None:
        self._rule, self._warned = rule, warned
        self.updates, self.due, self.rate = -1, 0.0, math.nan
        self._falls = self._without_gradient = 0
        self._ends: dict[str, int] = {}  # updates at which to warn, by kind of warning
        self._next_gradient = 1.0
        self._asked: tuple[Tensor, Any] | None = None

    def begin(self, states: Sequence[State]) -> None:
        """Continue the count of the parameters' updates; may synchronize a device."""
        if self.updates < 0:
            counts = self._rule.reads_horizon or self._rule.trained_steps is not None
            self.updates = _updates_of(states) if counts else 0

    def expect(self, group: dict[str, Any]) -> None:
        """Note the run's length; warn of a ``OneCycleLR`` with a small rate."""
        total = group["total_steps"] if self._anneals(group) else None
        trained = self._rule.trained_steps
        self._ends = {
            kind: end + 1
            for kind, end in (("past", total), ("trained", trained))
            if end is not None and kind not in self._warned
        }
        self._set_due()
        if 0.0 < (group.get("max_lr") or 0.0) <= SUSPICIOUS_LR:
            self._warn_of_rate("peak", "OneCycleLR", "max_lr", group["max_lr"])

    def _set_due(self) -> None:
        self.due = min([self._next_gradient, *self._ends.values()])

    def look(self, states: Sequence[State], grads: Sequence[Tensor]) -> None:
        """Look at the last update."""
        if self.updates >= self._next_gradient:
            self._look_at_gradients(grads)
        if any(self.updates >= end for end in self._ends.values()):
            self._look_at_end(states)
        self._set_due()

    # ---- the learning rate

    def fall(self, group: dict[str, Any], rate: float) -> None:
        """Note a learning rate below that of the update before."""
        self._falls += 1
        if "schedule" in self._warned:
            return
        if 0.0 < (group.get("swa_lr") or 0.0) < SHORT_SWA_LR:
            self._warn_of_rate("schedule", "SWALR", "swa_lr", float(group["swa_lr"]))
        elif self._falls >= FALLS_OF_A_SCHEDULE and self._anneals(group):
            warn_once(
                self._warned,
                "schedule",
                f"lr has fallen in {self._falls} steps, now to {rate:g}, while total_steps is "
                f"given: the rule {self._rule.name!r} anneals by itself, and a scheduler on top "
                f"anneals twice. Leave out one of them",
            )

    def _warn_of_rate(self, kind: str, scheduler: str, key: str, rate: float) -> None:
        warn_once(
            self._warned,
            kind,
            f"{scheduler} brings lr to {key}={rate:g}, which makes learned updates {1 / rate:.0f} "
            f"times shorter: lr multiplies them, and learning rates of other optimizers do not "
            f"carry over. Pass {key}=1.0, or the part of a full update that is meant",
        )

    def _anneals(self, group: dict[str, Any]) -> bool:
        return self._rule.reads_horizon and group["total_steps"] is not None

    # ---- the length of the run

    def _look_at_end(self, states: Sequence[State]) -> None:
        self.updates = _updates_of(states)  # synchronizes a device, once
        for kind, end in list(self._ends.items()):
            if self.updates >= end:
                del self._ends[kind]
                what = ENDS[kind].format(end - 1, self._rule.name)
                warn_once(self._warned, kind, f"step {self.updates} is past {what}")

    # ---- gradients

    def _look_at_gradients(self, grads: Sequence[Tensor]) -> None:
        own = [grad for grad in map(local, grads) if grad.numel() and has_values(grad)]
        missing = self._lacks_finite_entries(own) if own else False
        if missing is None:
            self._next_gradient = self.updates + 1
            return
        self._without_gradient = self._without_gradient + 1 if missing else 0
        self._next_gradient = self.updates + (1 if missing else GRADIENT_INTERVAL)
        if self._without_gradient >= UPDATES_WITHOUT_GRADIENT:
            self._next_gradient = math.inf
            warn_once(
                self._warned,
                "gradients",
                f"the gradient of a parameter has had no finite entry in "
                f"{self._without_gradient} steps. Entries that are NaN or infinite count as zero, "
                f"so it does not train. Look for the operation that makes them: "
                f"torch.autograd.set_detect_anomaly(True) names it",
            )

    def _lacks_finite_entries(self, grads: Sequence[Tensor]) -> bool | None:
        """Whether one of the gradients has no finite entry; ``None`` while a GPU has not answered.

        On a GPU the answer is that of the call before, so that no step waits.
        """
        device = grads[0].device
        if device.type not in ("cpu", "cuda") or any(grad.device != device for grad in grads):
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        answer = None
        if self._asked is not None:
            all_have, arrived = self._asked
            if not arrived.query():
                return None
            answer = not bool(all_have)
        all_have = torch.stack([grad.isfinite().any() for grad in grads]).all()
        if device.type == "cpu":
            return not bool(all_have)
        arrived = torch.cuda.Event()
        self._asked = all_have.to("cpu", non_blocking=True), arrived
        arrived.record()
        return answer


def _updates_of(states: Sequence[State]) -> int:
    """The largest number of updates of any of these parameters."""
    steps = [state["step"] for state in states if has_values(state["step"])]
    return int(torch.stack(steps).max()) if steps else 0
