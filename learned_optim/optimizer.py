"""The learned optimizer as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from learned_optim import _diagnostics, _group_step, _groups, _guarded, _saved_state
from learned_optim._ambient import outliving_inference_mode
from learned_optim._frozen import FrozenRule, freeze
from learned_optim._views import dense, local, real, shard_like
from learned_optim.guard import Guard, GuardAction
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._segments import is_sharded


class LearnedOptimizer(Optimizer):
    """Trains with updates computed by a learned update rule (Andrychowicz et al. 2016).

    ``theta <- theta * (1 - 1e-3 * lr * decay(t)) + lr * warmup(t) * rule(gradient history)``

    Args:
        params: parameters, named parameters or parameter groups, as for any ``torch.optim`` class.
        rule: a shipped checkpoint's name (:func:`learned_optim.list_pretrained`), a path to a
            checkpoint file or folder, a Hub id ``"user/repo"`` (optionally ``"@revision"``), or
            an :class:`~learned_optim.rules.UpdateRule` (which is copied).
        lr: multiplier of the learned update, a float or a tensor of one element. 1.0 is what the
            rule was trained for; the learning rates of other optimizers do not carry over. At 0
            a group is frozen: missing state is created, and nothing else changes.
        weight_decay: ``decay(t)``, decoupled and in AdamW's units: at ``lr=1`` a value shrinks the
            parameters as it does in ``AdamW(lr=1e-3)``. A rule with a schedule of its own, as
            ``horizon``, multiplies it by schedule and trust. ``None`` for the rule's own
            (:meth:`~learned_optim.rules.UpdateRule.default_weight_decay`): none, except in runs of
            known length by a rule that has one, as `default`.
        maximize: maximize the objective instead of minimizing it.
        state_dtype: dtype of per-coordinate state: float32, float64, bfloat16 (half the memory),
            or ``None`` for the rule's own (float32). Per-tensor state keeps the rule's.
        guard: ``True`` or a :class:`~learned_optim.Guard` for falling back to Adam while the
            learned updates do worse. ``step`` then needs a closure that returns the loss, and
            every parameter has state of three times its size more.
        total_steps: length of the run, for rules that read it
            (:attr:`~learned_optim.rules.UpdateRule.reads_horizon`): they anneal their updates
            towards its end by themselves, so leave out the scheduler. ``None`` if unknown.
        warmup: the updates of the first ``warmup`` steps of each parameter are multiplied by
            ``(step + 1) / warmup``; 0 for none, ``None`` for the rule's own
            (:attr:`~learned_optim.rules.UpdateRule.warmup_steps`).

    ``lr``, ``weight_decay``, ``maximize``, ``total_steps`` and ``warmup`` may differ by group.

    Parameters may be float64, float32, bfloat16, float16 or complex (seen as pairs of reals), on
    any device, dense or sharded (DTensor). State of a parameter of shape ``S`` is ``step``, of
    shape ``()``, and the rule's entries: ``(*S, k)`` per coordinate, sharded like the parameter;
    and per tensor, with the parameter's rows repeated so that tools may cut them, ``(S[0], k)``.

    A gradient entry that is NaN or infinite counts as zero, so that one bad batch poisons neither
    the parameters nor the recurrent state; finite ones are cut off at 2^48. The arithmetic of a
    step does not depend on autocast, default dtype or device, or matmul precision.

    Raises:
        TypeError: a learning rate in the place of the rule (``LearnedOptimizer(params, 1e-3)``).
        ValueError: a negative or non-finite learning rate or weight decay, another state dtype, a
            ``total_steps`` or ``warmup`` that counts no steps, an unknown checkpoint name, an empty
            parameter list, or a guard over groups of which some maximize and some minimize.
        FileNotFoundError: a checkpoint file or Hub repository that is not there.
        CheckpointError: a checkpoint that is damaged, foreign or of a newer format.

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
        guard: Guard | bool | None = None,
        total_steps: int | None = None,
        warmup: int | None = None,
    ) -> None:
        _groups.check_rule(rule)
        _groups.check_state_dtype(state_dtype)
        if not isinstance(guard, (Guard, bool, type(None))):
            raise TypeError(f"guard must be True or a learned_optim.Guard, got {guard!r}")
        self.state_dtype = state_dtype
        self.guard = Guard() if guard is True else guard or None
        self._use(freeze(rule))
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "total_steps": total_steps,
            "warmup": self.rule.warmup_steps if warmup is None else warmup,
        }
        super().__init__(params, defaults)
        _groups.warn_of_small_lr(self.param_groups)

    def _use(self, frozen: FrozenRule) -> None:
        """Make this the rule, and drop what was derived from another one."""
        self._frozen = frozen
        self.rule = frozen.rule
        self._guarded: dict[UpdateRule, _guarded.GuardedRule] = {}
        self._by_adam = False  # whether the guard lets Adam take the present step
        # State entries that were brought into our layout, by group and position: a step compares
        # them with those in ``self.state``, which loading and tools replace.
        self._accepted: list[list[State]] = []
        self._bound: dict[int, _group_step.BoundGroup | None] = {}
        self._monitor = _groups.HorizonMonitor()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = {**self.defaults, **param_group}
        if given["weight_decay"] is None:
            _groups.check_total_steps(given["total_steps"])
            decay = self.rule.default_weight_decay(given["total_steps"])
            given["weight_decay"] = param_group["weight_decay"] = decay
        _groups.check_group(given)
        maximize = param_group.get("maximize", self.defaults["maximize"])
        if self.guard and any(bool(g["maximize"]) != bool(maximize) for g in self.param_groups):
            raise ValueError(
                "a guard judges all groups by one loss: let all of them maximize it or none, or "
                "give each direction an optimizer of its own"
            )
        super().add_param_group(param_group)
        self._monitor.warn_if_ignored(self.rule, self.param_groups[-1])
        _guarded.sync_group(self.param_groups, self.guard)

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
                that read the loss and by a guard, optional otherwise. Where loss and gradients
                are at hand, ``lambda: loss`` will do. Under data parallelism it must return the
                mean loss of all ranks, or the replicas drift apart.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: the rule or the guard reads the loss and there is no closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.rule.needs_loss and loss is None:
            raise ValueError(
                f"the update rule {self.rule.name!r} of this optimizer reads the loss: call "
                f"step(closure) with a closure that returns it"
            )
        if self.guard is not None:
            action = _guarded.consult(self, self.guard, loss)
            if action is GuardAction.RESTORE:
                return loss
            self._by_adam = action is GuardAction.ADAM
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, loss)
        if not torch.compiler.is_compiling():
            self._monitor.watch(self.param_groups, self.state, self.rule)
        return loss

    def _step_group(self, index: int, group: dict[str, Any], loss: float | Tensor | None) -> None:
        """The bound step of a group; or the general one, after which the group is bound."""
        frozen = _groups.is_zero_without_sync(group["lr"])
        compiling = torch.compiler.is_compiling()
        if not (frozen or compiling):
            bound = self._bound.get(index)
            if bound is not None and bound.step_(self, group):
                return
        self._init_group(group)
        if frozen:
            return
        entries = self._accepted[index]
        _group_step.step_group(self, group, entries, loss)
        if not compiling:
            self._bound[index] = _group_step.bind(self, group, entries)

    def _init_group(self, group: dict[str, Any]) -> None:
        """Create missing state. torch.compile runs a method of this name instead of tracing it."""
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        while len(self._accepted) <= index:
            self._accepted.append([])
        _group_step.init_group(self, group, self._accepted[index])

    def _rule_for(self, param: Tensor) -> UpdateRule:
        """The rule with its weights on ``param``'s device, and the guard's around it."""
        rule = self._frozen.on(param)
        if self.guard is None:
            return rule
        if rule not in self._guarded:
            self._guarded[rule] = _guarded.GuardedRule(rule, self.guard)
        self._guarded[rule].by_adam = self._by_adam
        return self._guarded[rule]

    def _init_state(self, param: Tensor) -> State:
        """State before the first gradient: the number of steps, and what the rule keeps."""
        with outliving_inference_mode():
            rule, own = self._rule_for(param), real(local(param))
            state = rule.init_state(own)
            for key, value in state.items():
                if key not in rule.tensor_state:
                    value = dense(value.to(self._state_dtype_of(key) or value.dtype))
                    state[key] = shard_like(param, value) if is_sharded(param) else value
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            return {"step": step, **state}

    def _reset_state(self, param: Tensor, keep: Any) -> None:
        """Give a parameter fresh state, except for some entries and those of wrappers."""
        fresh = self._init_state(param)
        self.state[param].update({k: v for k, v in fresh.items() if k not in keep})

    def _state_dtype_of(self, key: str) -> torch.dtype | None:
        """Dtype asked for an entry. Adam's moments stand still in bfloat16, and a copy is exact."""
        return None if key in _guarded.GUARD_KEYS else self.state_dtype

    @property
    def guard_report(self) -> dict[str, int] | None:
        """What the guard did so far, in numbers to log; ``None`` without a guard.

        ``steps`` seen, ``interventions``, ``adam_steps`` of these, and ``active``: whether (1) or
        not (0) Adam takes the next step unless the loss of that step says otherwise.
        """
        return None if self.guard is None else _guarded.report(self.param_groups[0])

    # ---- what the last step did

    def diagnose(self, on: bool = True) -> None:
        """Record what every further step does, for :meth:`diagnostics`; ``False`` stops it.

        A recorded step takes several times as long, copies the parameters and the network's state,
        and synchronizes with the device. Others are as before. Copies of the optimizer record
        nothing.
        """
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = _diagnostics.Recorder(self) if on else None

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Numbers of the last step by tensor: its name if it has one, else group/position.

        Returns:
            Floats: ``step``, earlier updates of the tensor; ``grad_rms``, ``param_rms`` (before the
            step) and ``step_rms`` (weight decay included), root mean squares; ``step_ratio``, step
            over parameter; ``effective_lr``, with which gradient descent would have gone as far
            along the gradient; ``cosine`` of step and descent direction; ``schedule``, the factor
            of warm-up and annealing; of rules with momenta ``signal_share``, mean square of the
            fast momentum over that of the gradient; and for each direction of the rule ``gain/*``,
            positive downhill, and ``part/*``, the root mean square it adds to the step at ``lr=1``.
            Tensors without a gradient and frozen ones took no step and are left out.

        Raises:
            RuntimeError: nothing has been recorded.
        """
        if self._recorder is None or not self._recorder.stepped:
            raise RuntimeError(
                "no step has been recorded: call optimizer.diagnose() before optimizer.step(), "
                "and optimizer.diagnose(False) when the numbers are no longer wanted"
            )
        return self._recorder.found

    # ---- saving, copying, loading

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s, with the update rule's name and fingerprint under ``"rule"``."""
        saved = super().state_dict()
        return {
            **saved,
            "state": _saved_state.compact(self, saved["state"]),
            "rule": dict(self._frozen.identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; recurrent state keeps its dtype and bits.

        Entries that a wrapper added to the state of parameters are passed through untouched.

        Raises:
            ValueError: the state belongs to another update rule, or to other parameter groups.
        """
        # torch casts floating state to the parameter's dtype, which would round the recurrent
        # state of half-precision parameters: the saved values are put back before any other hook.
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            if _saved_state.has_as_many_parameters(self, loaded):  # else torch says so
                _saved_state.check_identity(loaded, self._frozen.identity)
                _saved_state.check_entries(self, loaded)
            final.update(loaded)

        last = self.register_load_state_dict_pre_hook(check)
        first = self.register_load_state_dict_post_hook(
            lambda _: _saved_state.restore(self, final), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups alone: the network would vanish in a copy.
        kept = {"rule": self.rule, "state_dtype": self.state_dtype, "guard": self.guard}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("guard", None)  # pickled before there were guards
        for group in self.param_groups:
            for key, value in _groups.ABSENT.items():
                group.setdefault(key, value)
        _guarded.sync_group(self.param_groups, self.guard)
        # load_state_dict comes by here as well, and keeps the rule.
        self._use(FrozenRule(self.rule) if "rule" in state else self._frozen)

    def __repr__(self) -> str:
        rule = f"{self._frozen.identity['name']} {self._frozen.identity['fingerprint']}"
        if self.guard is not None:
            rule += f"\n{self.guard}"
        # What the guard has seen is in guard_report, more legibly.
        lines = super().__repr__().replace(" (\n", f" (\nUpdate rule: {rule}\n", 1).split("\n")
        hidden = f"    {_guarded.STATE_KEY}: "
        return "\n".join(line for line in lines if not line.startswith(hidden))
