"""The guard at work: a rule around two rules, and what an optimizer does when it intervenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learned_optim._views import local, real
from learned_optim.guard import Guard, GuardAction, GuardState
from learned_optim.rules import State, UpdateRule
from learned_optim.rules.classical import AdamConfig, AdamRule

if TYPE_CHECKING:
    from learned_optim.optimizer import LearnedOptimizer

# Adam's state entries, by their names there; a copy of the parameter; and the number of updates
# since the rule at work had fresh state.
ADAM_KEYS = {f"guard_{key}": key for key in ("first_moment", "second_moment")}
SNAPSHOT, AGE = "guard_snapshot", "guard_age"
GUARD_KEYS = (*ADAM_KEYS, SNAPSHOT, AGE)
#: Key of the first group under which the guard keeps what it has seen. Distributed checkpoints and
#: ZeRO keep it there: of a state dict they know nothing but state and groups.
STATE_KEY = "guard_watch"


class GuardedRule(UpdateRule):
    """An update rule and Adam, one of which takes each step; the state is the union of theirs.

    Args:
        rule: the learned rule.
        guard: settings, of which Adam's learning rate counts here.
    """

    def __init__(self, rule: UpdateRule, guard: Guard) -> None:
        super().__init__()
        self.rule = rule
        self.fallback = AdamRule(AdamConfig(lr=guard.lr))
        self.by_adam = False
        self.tensor_state = (*rule.tensor_state, AGE)  # type: ignore[misc]

    def init_state(self, param: Tensor) -> State:
        adam = self.fallback.init_state(param)
        return {
            **self.rule.init_state(param),
            **{key: adam[own] for key, own in ADAM_KEYS.items()},
            SNAPSHOT: param.clone(memory_format=torch.contiguous_format).unsqueeze(-1),
            AGE: torch.zeros(1, dtype=torch.float32, device=param.device),
        }

    @torch.no_grad()
    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        **options: Any,
    ) -> None:
        """See :meth:`UpdateRule.step_`."""
        ages = [state[AGE].view(()) for state in states]
        active: UpdateRule
        if self.by_adam:
            own = [{key: state[k] for k, key in ADAM_KEYS.items()} for state in states]
            options["warmup"], active = 0, self.fallback
            if self.rule.default_weight_decay(options.get("total_steps")) > 0:
                options["weight_decay"] = 0.0  # meant for the rule's schedule, which Adam lacks
        else:
            own, active = [dict(state) for state in states], self.rule
            if options.get("total_steps") is not None and self.rule.reads_horizon:
                lost = max(float(s["step"]) - float(a) for s, a in zip(states, ages, strict=True))
                options["total_steps"] = remaining(options["total_steps"], lost)
        for state, age in zip(own, ages, strict=True):
            state["step"] = age
        active.step_(params, grads, own, **options)
        torch._foreach_add_([state["step"] for state in states], 1)


def remaining(total_steps: float, lost: float) -> float:
    """Length of the run for which a rule with fresh state plans, some steps having been lost."""
    return max(1.0, total_steps - lost)


def report(group: dict[str, Any]) -> dict[str, int]:
    """What the guard did so far, from the first group."""
    seen = GuardState(**group[STATE_KEY])
    return {
        "steps": seen.steps,
        "interventions": seen.interventions,
        "adam_steps": seen.adam_steps,
        "active": int(seen.remaining > 0),
    }


def consult(optimizer: LearnedOptimizer, guard: Guard, loss: float | Tensor | None) -> GuardAction:
    """Show the guard the loss, and do to parameters and state what it says.

    Raises:
        RuntimeError: in a compiled step.
        ValueError: no loss.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a guard decides in Python what each step does, which no graph can hold: compile "
            "the model and call step() uncompiled, or leave out the guard"
        )
    groups = optimizer.param_groups
    if all(float(group["lr"]) == 0.0 for group in groups):
        return GuardAction.LEARNED  # nothing will move, and nothing is to be noted
    if loss is None:
        raise ValueError(
            "the guard of this optimizer reads the loss: call step(closure) with a closure "
            "that returns it, or step(lambda: loss) after loss.backward()"
        )
    seen = GuardState(**groups[0][STATE_KEY])
    was_adam = seen.remaining > 0
    action = seen.observe(-float(loss) if groups[0]["maximize"] else float(loss), guard)
    # A new dictionary: state dicts taken earlier hold the old one.
    groups[0][STATE_KEY] = vars(seen)
    handover = was_adam and seen.remaining == 0
    if action in (GuardAction.SNAPSHOT, GuardAction.RESTORE) or handover:
        for group in groups:
            optimizer._init_group(group)
            for param in filter(optimizer.state.__contains__, group["params"]):
                state = optimizer.state[param]
                if action is GuardAction.SNAPSHOT:
                    snapshot_of(state).copy_(real(local(param)))
                elif action is GuardAction.RESTORE and float(group["lr"]) != 0.0:
                    real(local(param)).copy_(snapshot_of(state))
                    # What led here is in the rule's memory, and would be in any second moment.
                    optimizer._reset_state(param, keep=("step", SNAPSHOT))
                if handover and float(group["lr"]) != 0.0:
                    optimizer._reset_state(param, keep=set(state) - {AGE})
    return action


def snapshot_of(state: dict[str, Any]) -> Tensor:
    """The guard's copy of a parameter, of the shape of the real view of the local shard."""
    return local(state[SNAPSHOT]).squeeze(-1)


def sync_group(groups: list[dict[str, Any]], guard: Guard | None) -> None:
    """Let the first group hold what the guard has seen, and no group without a guard."""
    if guard is None:
        for group in groups:
            group.pop(STATE_KEY, None)
    elif groups:
        groups[0].setdefault(STATE_KEY, vars(GuardState()))
