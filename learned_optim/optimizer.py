"""The learned optimizer as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from learned_optim import _diagnostics, _groups
from learned_optim._frozen import FrozenRule, freeze, source_name
from learned_optim._group_step import GroupStep, calls_of, settings_of
from learned_optim._param_states import ParamStates
from learned_optim._warn import warn, warn_once
from learned_optim._watch import GroupWatch
from learned_optim.rules import UpdateRule


class LearnedOptimizer(Optimizer):
    """Trains with updates computed by a learned update rule (Andrychowicz et al. 2016).

    ``theta <- theta * (1 - 1e-3 * lr * decay(t)) + lr * warmup(t) * rule(gradient history)``

    Args:
        params: parameters, named parameters or parameter groups, as for any ``torch.optim`` class.
        rule: a shipped checkpoint's name (:func:`learned_optim.list_pretrained`), a path to a
            checkpoint file or folder, a Hub id ``"user/repo"`` (optionally ``"@revision"``), or
            an :class:`~learned_optim.rules.UpdateRule` (which is copied).
        lr: multiplier of the learned update, a float or a tensor of one element. 1.0 is what the
            rule was trained for; learning rates of other optimizers do not carry over. 0 freezes
            a group: missing state is created, and nothing else changes.
        weight_decay: ``decay(t)``, decoupled and in AdamW's units: at ``lr=1`` a value shrinks the
            parameters as it does in ``AdamW(lr=1e-3)``. Rules with a schedule multiply it by that;
            ``horizon`` also by its step confidence. ``None`` for the rule's own
            (:meth:`~learned_optim.rules.UpdateRule.default_weight_decay`): that of ``horizon``
            in runs of known length, 0 in all others.
        maximize: maximize the objective instead of minimizing it.
        state_dtype: dtype of per-coordinate state: float32, float64, bfloat16 (half the memory),
            or ``None`` for the rule's own (float32). Per-tensor state keeps the rule's.
        total_steps: length of the run, a whole number of any type, for rules that read it
            (:attr:`~learned_optim.rules.UpdateRule.reads_horizon`). They anneal their updates, so
            leave out the scheduler. ``None``, ``inf`` or -1, as trainers write it, if unknown.
        warmup: the updates of the first ``warmup`` steps of each parameter are multiplied by
            ``(step + 1) / warmup``; 0 for none, ``None`` for the rule's own
            (:attr:`~learned_optim.rules.UpdateRule.warmup_steps`).

    ``lr``, ``weight_decay``, ``maximize``, ``total_steps`` and ``warmup`` may differ by group, and
    may be set in ``param_groups`` in mid-run: the next step checks and uses the new values.

    Parameters may be float64, float32, bfloat16, float16 or complex (seen as pairs of reals), on
    any device, dense or sharded (DTensor). State of a parameter of shape ``S`` is ``step``, of
    shape ``()``, and the rule's entries: ``(*S, k)`` per coordinate, sharded like the parameter;
    and per tensor, with the parameter's rows repeated so that tools may cut them, ``(S[0], k)``.

    A gradient entry that is NaN or infinite counts as zero, so that one bad batch poisons neither
    the parameters nor the recurrent state; finite ones are cut off at 2^48. The arithmetic of a
    step does not depend on autocast, default dtype or device, or matmul precision.

    Raises:
        TypeError: a learning rate in the place of the rule, as in ``LearnedOptimizer(params,
            1e-3)``, or an argument of another optimizer, such as ``betas`` or ``fused``.
        ValueError: a value out of range, an unknown checkpoint name, or no parameters.
        FileNotFoundError: no such checkpoint file or Hub repository.
        CheckpointError: a checkpoint that is damaged, foreign or of another format version.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LearnedOptimizer(model.parameters(), "mnist")
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _recorder: _diagnostics.Recorder | None = None

    def __init__(
        self,
        params: ParamsT,
        rule: str | os.PathLike[str] | UpdateRule = "default",
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        total_steps: float | None = None,
        warmup: int | None = None,
        **unknown: Any,
    ) -> None:
        _groups.check_rule(rule)
        _groups.check_state_dtype(state_dtype)
        if unknown:
            _groups.check_unknown(unknown, inspect.signature(LearnedOptimizer).parameters)
        self.state_dtype = state_dtype
        self._use(freeze(rule), source_name(rule))
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "total_steps": _groups.whole_steps(total_steps),
            "warmup": self._frozen.rule.warmup_steps if warmup is None else warmup,
        }
        super().__init__(params, defaults)
        _groups.warn_of_small_lr(self.param_groups)

    def _use(self, frozen: FrozenRule, source: str | None) -> None:
        """Make this the rule; ``source`` names its checkpoint."""
        self._frozen, self._source = frozen, source
        self._states = ParamStates(frozen, self.state_dtype)
        # Lengths of the run that came from a loaded state dict, by group.
        self._loaded_total_steps: list[int | None] = []
        self._warned: set[str] = set()  # kinds of warnings that were given
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Prepare all groups and count their updates anew: state was replaced."""
        self._states.forget_layout()
        self._group_steps: dict[int, GroupStep] = {}
        self._watches: dict[int, GroupWatch] = {}
        self._warned.discard("past")

    @property
    def rule(self) -> UpdateRule:
        """A copy of the update rule; changing it changes no optimizer."""
        return copy.deepcopy(self._frozen.rule)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rule = self._frozen.rule
        group = {**self.defaults, **param_group}
        _groups.settle(rule, group)
        for key in ("total_steps", "warmup", "weight_decay", _groups.OWN_DECAY):
            param_group[key] = group[key]
        _groups.warn_of_foreign_keys(param_group, self._warned)
        super().add_param_group(param_group)
        if group["total_steps"] is not None and not rule.reads_horizon:
            warn_once(
                self._warned,
                "ignored",
                f"total_steps={group['total_steps']} has no effect: the update rule "
                f"{rule.name!r} does not know the length of a run. Leave it out, or choose a "
                f"checkpoint of a rule that does",
            )

    # ---- one step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients and returns the loss. Needed by rules
                that read the loss, optional otherwise. Where loss and gradients are at hand,
                ``lambda: loss`` will do. Under data parallelism it must return the mean loss of all
                ranks, or the replicas drift apart.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: the rule reads the loss and there is no closure, or a value of a group has
                become one that the constructor would refuse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        for index, group in enumerate(self.param_groups):
            if compiling:
                self._traced_step(index, group, loss)
                continue
            step = self._group_steps.get(index)
            if step is None or not step.fits(group["params"], self.state):
                step = self._group_steps[index] = self._prepared(index, group)
            step.step_(group, loss)
        return loss

    def _prepared(self, index: int, group: dict[str, Any]) -> GroupStep:
        """The step of a group, whose missing state is created."""
        self._states.lay_out(index, group["params"], self.state)
        fresh = GroupWatch(self._frozen.rule, self._warned)
        watch = self._watches.setdefault(index, fresh)
        return GroupStep(index, group, self._states, self.state, watch)

    def _traced_step(self, index: int, group: dict[str, Any], loss: float | Tensor | None) -> None:
        """A group's step as torch.compile sees it: nothing prepared, and no warnings."""
        self._init_group(group)
        if _groups.rate_of(group["lr"], index) != 0.0:
            for call in calls_of(index, group, self._states, self.state):
                call.step_(settings_of(group), loss)

    def _init_group(self, group: dict[str, Any]) -> None:
        """Create missing state; torch.compile runs this method instead of tracing it."""
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        self._states.lay_out(index, group["params"], self.state)

    # ---- diagnostics

    def diagnose(self, on: bool = True) -> None:
        """Record every further step for :meth:`diagnostics`; ``False`` stops recording.

        A recorded step takes several times as long, copies the parameters and the network's state,
        and synchronizes with the device. Copies of the optimizer record nothing.
        """
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = _diagnostics.Recorder(self, self._states) if on else None

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Numbers of the last step by tensor, under its name or else ``group/position``.

        Returns:
            Floats: ``step``, earlier updates of the tensor; ``grad_rms``, ``param_rms`` (before the
            step) and ``step_rms`` (weight decay included), root mean squares; ``step_ratio``, step
            over parameter; ``effective_lr``, the learning rate at which gradient descent would go
            as far along the gradient; ``cosine`` of step and descent direction; ``schedule``, the
            factor of warm-up and annealing; of rules with momenta ``signal_share``, mean square of
            the fast momentum over that of the gradient; and for each direction of the rule
            ``gain/*``, positive downhill, and ``part/*``, the root mean square of its part of the
            step at ``lr=1`` without warm-up. Rotated matrices have gains in their eigenbasis.
            Frozen tensors and tensors without a gradient are left out.

        Raises:
            RuntimeError: nothing has been recorded.
        """
        if self._recorder is None or self._recorder.found is None:
            raise RuntimeError(
                "no step has been recorded: call optimizer.diagnose() before optimizer.step(), "
                "and optimizer.diagnose(False) when the numbers are no longer wanted"
            )
        return {name: dict(numbers) for name, numbers in self._recorder.found.items()}

    # ---- saving, copying, loading

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s, with the update rule's name and fingerprint under ``"rule"``."""
        saved = super().state_dict()
        return {
            **saved,
            "state": self._states.compact(self.param_groups, saved["state"]),
            "rule": dict(self._frozen.identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; recurrent state keeps its dtype and bits.

        As in torch, groups take the saved values, except for ``total_steps``: one that was passed
        to this optimizer stays, with a warning if the saved one differs, because runs are resumed
        to be extended. The rule's own weight decay follows the length that is used. Entries that a
        wrapper has added to the state are restored unchanged.

        Raises:
            ValueError: the state belongs to another update rule, or to other parameter groups.
        """
        given: list[Any] = []  # lengths of the run that this optimizer was given, by group
        earlier = chain(self._loaded_total_steps, repeat(None))
        for group, loaded in zip(self.param_groups, earlier, strict=False):
            given.append(None if group["total_steps"] == loaded else group["total_steps"])
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            self._states.check(self.param_groups, loaded)
            final.update(loaded)

        def restore(_: Optimizer) -> None:
            self._states.restore(self.param_groups, self.state, final)
            self._keep_total_steps(given)

        # First of the post-hooks, so that others find the restored state.
        last = self.register_load_state_dict_pre_hook(check)
        first = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _keep_total_steps(self, given: list[Any]) -> None:
        """Check loaded groups; lengths that this optimizer was given stay."""
        differing, self._loaded_total_steps = [], []
        for group, total_steps in zip(self.param_groups, given, strict=True):
            saved = group["total_steps"]
            if total_steps is not None:
                group["total_steps"] = total_steps
                if _groups.whole_steps(total_steps) != saved:
                    differing.append((total_steps, saved))
            self._loaded_total_steps.append(saved if total_steps is None else None)
            _groups.settle(self._frozen.rule, group)
        if differing:
            warn(
                f"total_steps={differing[0][0]} of this optimizer is kept, and "
                f"total_steps={differing[0][1]} of the loaded state is not: the run goes on as one "
                f"of the new length. To finish the old one, construct the optimizer without "
                f"total_steps"
            )

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups: a copy would have no rule.
        return {
            **super().__getstate__(),
            "state_dtype": self.state_dtype,
            "_rule": self._frozen.rule,
            "_source": self._source,
            "_loaded_total_steps": self._loaded_total_steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        rule = state.pop("_rule", None)
        super().__setstate__(state)
        if rule is None:  # called by load_state_dict
            for group in self.param_groups:
                group.update(self.defaults | group)  # a tool may have left out values
            self._forget_steps()
        else:
            self._use(FrozenRule(rule), state["_source"])
            self._loaded_total_steps = state["_loaded_total_steps"]

    def __repr__(self) -> str:
        identity = self._frozen.identity
        rule = f"{identity['name']} {identity['fingerprint']}"
        if self._source is not None:
            rule += f", checkpoint {self._source}"
        lines = super().__repr__().replace(" (\n", f" (\nUpdate rule: {rule}\n", 1).split("\n")
        return "\n".join(line for line in lines if f" {_groups.OWN_DECAY}: " not in line)
