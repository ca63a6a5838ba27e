"""The learned optimizer as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from learned_optim.guard import Guard, Verdict, Watch
from learned_optim.pretrained import load_rule
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._shards import is_sharded, shards_of
from learned_optim.rules.handmade import AdamConfig, AdamRule

# A learning rate from Adam's world: kept by keyword, it would scale every learned update by it.
SUSPICIOUS_LR = 0.01

# Weight decay is in AdamW's units: at lr = 1 it shrinks as AdamW does at its usual lr of 1e-3.
DECAY_UNIT = 1e-3

# Finite gradients are cut off here: their squares, which many rules average, fit into float32 even
# when summed over a tensor of two thousand million coordinates.
LARGEST_GRAD = 2.0**48

# Coordinates in a pack of small tensors: bounds the copies that packing makes of their state.
LARGEST_PACK = 1 << 16

# State entries of the guard, beside the rule's: Adam's, by their names there, and a copy of the
# parameter.
ADAM_KEYS = {f"guard_{key}": key for key in ("first_moment", "second_moment", "count")}
SNAPSHOT = "guard_snapshot"
GUARD_KEYS = frozenset({*ADAM_KEYS, SNAPSHOT})
# Key of the first group under which the guard keeps what it has seen.
WATCH = "guard_watch"

# Hyperparameters that groups of torch's own optimizers have and ours have not.
FOREIGN_KEYS = frozenset({"alpha", "betas", "dampening", "momentum", "nesterov", "rho"})


class LearnedOptimizer(Optimizer):
    """Trains with updates computed by a learned update rule (Andrychowicz et al. 2016).

    ``theta <- theta * (1 - 1e-3 * lr * weight_decay) + lr * rule(gradient history)``

    Args:
        params: parameters, named parameters or parameter groups, as for any ``torch.optim`` class.
        rule: a shipped checkpoint's name (:func:`learned_optim.list_pretrained`), a path to a
            checkpoint file or folder, a Hub id ``"user/repo"`` (optionally ``"@revision"``), or
            an :class:`~learned_optim.rules.UpdateRule` (which is copied).
        lr: multiplier of the learned update, a float or a tensor of one element. 1.0 is what the
            rule was trained for; the learning rates of other optimizers do not carry over. At 0
            a group is frozen: missing state is created, and nothing else changes.
        weight_decay: decoupled, in AdamW's units: at ``lr=1`` a value shrinks the parameters as
            it does in ``AdamW(lr=1e-3)``.
        maximize: maximize the objective instead of minimizing it.
        state_dtype: dtype of per-coordinate state: float32, float64, bfloat16 (half the memory),
            or ``None`` for the rule's own (float32). Per-tensor state keeps the rule's.
        guard: ``True`` or a :class:`~learned_optim.Guard` for falling back to Adam while the
            learned updates do worse. ``step`` then needs a closure that returns the loss, and
            every parameter has state of three times its size more.

    Parameters may be float64, float32, bfloat16, float16 or complex (seen as pairs of reals), on
    any device, dense or sharded (DTensor). State of a parameter of shape ``S`` is ``step``, of
    shape ``()``, and the rule's entries: ``(*S, k)`` per coordinate, sharded like the parameter,
    or ``()`` and ``(k,)`` per tensor.

    A gradient entry that is NaN or infinite counts as zero, so that one bad batch poisons neither
    the parameters nor the recurrent state; finite ones are cut off at 2^48.

    Raises:
        TypeError: a learning rate in the place of the rule (``LearnedOptimizer(params, 1e-3)``).
        ValueError: a negative or non-finite learning rate or weight decay, another state dtype,
            an unknown checkpoint name, an empty parameter list, or a guard over groups of which
            some maximize and some minimize.
        FileNotFoundError: a checkpoint file or Hub repository that is not there.
        CheckpointError: a checkpoint that is damaged, foreign or of a newer format.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LearnedOptimizer(model.parameters(), "mnist")
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | os.PathLike[str] | UpdateRule = "default",
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        guard: Guard | bool | None = None,
    ) -> None:
        if not isinstance(rule, (str, os.PathLike, UpdateRule)):
            raise TypeError(
                f"the second argument of LearnedOptimizer is the update rule, got {rule!r}. If it "
                f"was Adam's learning rate, leave it out: LearnedOptimizer(params) needs none "
                f"(lr=1.0 is a multiplier of the learned update)"
            )
        if state_dtype not in (None, torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be a floating point dtype, got {state_dtype}: one of "
                f"torch.float32, torch.float64 and torch.bfloat16 (float16's range is too short "
                f"for running moments)"
            )
        if not isinstance(guard, (Guard, bool, type(None))):
            raise TypeError(f"guard must be True or a learned_optim.Guard, got {guard!r}")
        loaded = copy.deepcopy(rule) if isinstance(rule, UpdateRule) else load_rule(rule)
        self.rule = loaded.requires_grad_(False).eval()
        self.state_dtype = state_dtype
        self.guard = Guard() if guard is True else guard or None
        self._reset_caches()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        small = [g["lr"] for g in self.param_groups if 0.0 < float(g["lr"]) <= SUSPICIOUS_LR]
        if small:
            warnings.warn(
                f"LearnedOptimizer got lr={float(small[0]):g}, which scales every learned update "
                f"by that much and trains about {1 / float(small[0]):.0f} times too slowly. lr "
                f"multiplies the update; learning rates of other optimizers do not carry over. "
                f"Leave it out, or pass lr=1.0",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        lr = param_group.get("lr", self.defaults["lr"])
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not math.isfinite(lr) or lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        weight_decay = param_group.get("weight_decay", self.defaults["weight_decay"])
        if not math.isfinite(weight_decay) or weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        maximize = param_group.get("maximize", self.defaults["maximize"])
        if self.guard and any(bool(g["maximize"]) != bool(maximize) for g in self.param_groups):
            raise ValueError(
                "a guard judges all groups by one loss: let all of them maximize it or none, or "
                "give each direction an optimizer of its own"
            )
        super().add_param_group(param_group)
        self._settle_guard()

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
        by_adam = False
        if self.guard is not None:
            verdict = self._consult_guard(self.guard, loss)
            if verdict is Verdict.GO_BACK:
                return loss
            by_adam = verdict is Verdict.ADAM
        for group in self.param_groups:
            self._init_group(group)
            if _known_zero(group["lr"]):
                continue
            for params, pack in self._together(group, by_adam):
                packed = pack and len(params) > 1
                (self._update_packed if packed else self._update)(params, group, loss, by_adam)
        return loss

    def _init_group(self, group: dict[str, Any]) -> None:
        """Create missing state. torch.compile runs a method of this name instead of tracing it."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"LearnedOptimizer does not support sparse gradients, and a parameter of shape "
                    f"{tuple(param.shape)} has one of layout {param.grad.layout}: use sparse=False "
                    f"in the embedding, or give that parameter to torch.optim.SparseAdam"
                )
            state = self.state[param]
            if "step" not in state:
                state.update(self._init_state(param))
            self._rule_on(param.device)

    def _together(self, group: dict[str, Any], by_adam: bool) -> list[tuple[list[Tensor], bool]]:
        """Parameters that have a gradient, by which of them are updated together, and how.

        Small tensors are packed into one. Larger ones are updated block by block, together for
        the sake of what a rule computes per tensor. Some have to be updated on their own.
        """
        every: list[tuple[list[Tensor], bool]] = []
        packs: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        room: dict[tuple[torch.device, torch.dtype], int] = {}
        large: dict[torch.device, list[Tensor]] = {}
        alone = torch.compiler.is_compiling() or _unreadable(group["lr"])
        pack_below = (self._fallback if by_adam else self.rule).pack_below
        for param in group["params"]:
            if param.grad is None:
                continue
            size, kind = param.numel(), (param.device, param.dtype)
            if alone or is_sharded(param):
                every.append(([param], False))
            elif size < pack_below:
                if room.get(kind, 0) < size or kind not in packs:
                    packs[kind], room[kind] = [], LARGEST_PACK
                    every.append((packs[kind], True))
                packs[kind].append(param)
                room[kind] -= size
            elif not param.is_contiguous():
                every.append(([param], False))
            else:
                if param.device not in large:
                    every.append((large.setdefault(param.device, []), False))
                large[param.device].append(param)
        return every

    def _update(
        self,
        params: list[Tensor],
        group: dict[str, Any],
        loss: float | Tensor | None,
        by_adam: bool,
    ) -> None:
        """Update tensors of one device, of which none is sharded if there are several."""
        rule = self._fallback if by_adam else self._rule_on(params[0].device)
        lr, weight_decay = group["lr"], group["weight_decay"]
        grads = [param.grad for param in params if param.grad is not None]
        states: list[State] = [self.state[param] for param in params]
        with _whole_tensor(params[0]):
            if is_sharded(params[0]):
                grads = [_local_grad(grads[0], params[0])]
                states = [{key: _local(value) for key, value in states[0].items()}]
            params = [_real(_local(param)) for param in params]
            grads = [_real(grad) for grad in grads]
            if isinstance(lr, Tensor):
                lr = lr.to(params[0].device).reshape(())
            if weight_decay != 0:
                for param in params:
                    param.mul_(1.0 - DECAY_UNIT * lr * weight_decay)
            seen_loss = _seen_loss(rule, loss, params[0].device)
            # Where only the device knows whether lr is zero, the state before may be needed.
            keep = _unreadable(group["lr"])
            before = [{k: v.clone() for k, v in s.items()} if keep else {} for s in states]
            rule_states = [_rule_state(state, by_adam) for state in states]
            read = _reader(rule.dtype, group["maximize"])
            if torch.compiler.is_compiling() or not all(p.is_contiguous() for p in params):
                for grad, state, param in zip(grads, rule_states, params, strict=True):
                    update = rule.update_(read(grad), state, param.to(rule.dtype), seen_loss)
                    _add(param, update, lr)
            else:
                pieces = rule.update_blocks_(grads, rule_states, params, seen_loss, read)
                flat = [param.view(-1) for param in params]
                for index, rows, update in pieces:
                    _add(flat[index][rows], update, lr)
            for state, old in zip(states, before, strict=True):
                state["step"] += 1
                for key, value in old.items():
                    state[key].copy_(torch.where(lr != 0, state[key], value))

    def _update_packed(
        self,
        params: list[Tensor],
        group: dict[str, Any],
        loss: float | Tensor | None,
        by_adam: bool,
    ) -> None:
        """:meth:`_update` of several small tensors of one device and dtype at once."""
        device = params[0].device
        rule = self._fallback if by_adam else self._rule_on(device)
        lr, dtype = float(group["lr"]), rule.dtype
        states = [self.state[param] for param in params]
        grads = [_real(param.grad) for param in params if param.grad is not None]
        params = [_real(param) for param in params]
        read = _reader(dtype, group["maximize"])
        cleaned = read(torch.cat([grad.reshape(-1) for grad in grads]))
        pieces = cleaned.split([grad.numel() for grad in grads])
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1.0 - DECAY_UNIT * lr * group["weight_decay"])
        updates, _ = rule.update_many_(
            [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)],
            [_rule_state(state, by_adam) for state in states],
            [param.to(dtype) for param in params],
            _seen_loss(rule, loss, device),
        )
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_add_(params, updates, alpha=lr)

    @torch.no_grad()
    def _init_state(self, param: Tensor) -> State:
        """State before the first gradient: the count of steps, and what the rule keeps."""
        with _whole_tensor(param):
            local = _real(_local(param))
            state = self._rule_on(param.device).init_state(local)
            if self.guard is not None:
                adam = self._fallback.init_state(local)
                state.update({key: adam[own] for key, own in ADAM_KEYS.items()})
                state[SNAPSHOT] = local.clone(memory_format=torch.contiguous_format).unsqueeze(-1)
        for key, value in state.items():
            if _per_coordinate(value, local.shape):
                value = value.to(self._state_dtype_of(key) or value.dtype)
                state[key] = _shard_like(param, value) if is_sharded(param) else value
        return {"step": torch.zeros((), dtype=torch.float32, device=param.device), **state}

    def _state_dtype_of(self, key: str) -> torch.dtype | None:
        """Dtype asked for an entry. Adam's moments stand still in bfloat16, and a copy is exact."""
        return None if key in GUARD_KEYS else self.state_dtype

    def _rule_on(self, device: torch.device) -> UpdateRule:
        """The rule with its weights on ``device``, copied there at first use."""
        if device not in self._rules:
            self._rules[device] = copy.deepcopy(self.rule).to(device)
        return self._rules[device]

    # ---- the guard

    @property
    def guard_report(self) -> dict[str, int] | None:
        """What the guard did so far, in numbers to log; ``None`` without a guard.

        ``steps`` seen, ``interventions``, ``adam_steps`` of these, and ``active``: whether (1) or
        not (0) Adam takes the next step unless the loss of that step says otherwise.
        """
        if self.guard is None:
            return None
        watch = Watch(**self.param_groups[0][WATCH])
        return {
            "steps": watch.steps,
            "interventions": watch.interventions,
            "adam_steps": watch.adam_steps,
            "active": int(watch.remaining > 0),
        }

    def _consult_guard(self, guard: Guard, loss: float | Tensor | None) -> Verdict:
        """Show the guard the loss, and do to parameters and state what it says."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a guard decides in Python what each step does, which no graph can hold: compile "
                "the model and call step() uncompiled, or leave out the guard"
            )
        if all(float(group["lr"]) == 0.0 for group in self.param_groups):
            return Verdict.LEARNED  # nothing will move, and nothing is to be noted
        if loss is None:
            raise ValueError(
                "the guard of this optimizer reads the loss: call step(closure) with a closure "
                "that returns it, or step(lambda: loss) after loss.backward()"
            )
        first = self.param_groups[0]
        watch = Watch(**first[WATCH])
        verdict = watch.see(-float(loss) if first["maximize"] else float(loss), guard)
        # A new dictionary: state dicts taken earlier hold the old one.
        first[WATCH] = vars(watch)
        if verdict in (Verdict.KEEP, Verdict.GO_BACK):
            for group in self.param_groups:
                self._init_group(group)
                for param in filter(self.state.__contains__, group["params"]):
                    if verdict is Verdict.KEEP:
                        _snapshot(self.state[param]).copy_(_real(_local(param)))
                    elif float(group["lr"]) != 0.0:
                        self._go_back(param)
        return verdict

    def _go_back(self, param: Tensor) -> None:
        """Restore the copy of a parameter, with fresh state."""
        _real(_local(param)).copy_(_snapshot(self.state[param]))
        # What led here is in the rule's memory, and would be in any second moment.
        fresh = self._init_state(param)
        kept = ("step", SNAPSHOT)
        self.state[param].update({key: v for key, v in fresh.items() if key not in kept})

    def _settle_guard(self) -> None:
        """Let the first group hold what the guard has seen, and no group without a guard.

        There distributed checkpoints and ZeRO keep it: of a state dict they know nothing but state
        and groups.
        """
        if self.guard is None:
            for group in self.param_groups:
                group.pop(WATCH, None)
        elif self.param_groups:
            self.param_groups[0].setdefault(WATCH, vars(Watch()))

    def _settle_guard_state(self, param: Tensor) -> None:
        """Make up for a guard that was on when state was saved and is off now, or the reverse."""
        state = self.state[param]
        if self.guard is None:
            for key in GUARD_KEYS & state.keys():
                del state[key]
        elif SNAPSHOT not in state:
            fresh = self._init_state(param)
            state.update({key: fresh[key] for key in GUARD_KEYS})

    # ---- saving, copying, loading

    def _reset_caches(self) -> None:
        self._fallback = AdamRule(AdamConfig(lr=(self.guard or Guard()).lr))
        self._rules: dict[torch.device, UpdateRule] = {}
        self._identity = {"name": self.rule.name, "fingerprint": self.rule.fingerprint()}

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s, with the update rule's name and fingerprint under ``"rule"``."""
        return {**super().state_dict(), "rule": dict(self._identity)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; recurrent state keeps its dtype and bits.

        Raises:
            ValueError: the state belongs to another update rule, or to other parameter groups.
        """
        # torch casts floating state to the parameter's dtype, which would round the recurrent
        # state of half-precision parameters: the saved values are put back before any other hook.
        final: dict[str, Any] = {}

        def keep(_: Optimizer, loaded: dict[str, Any]) -> None:
            self._check_state(loaded)
            final.update(loaded)

        last = self.register_load_state_dict_pre_hook(keep)
        first = self.register_load_state_dict_post_hook(
            lambda _: self._restore_state(final), prepend=True
        )
        try:
            self._check_identity(state_dict)
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _check_identity(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("rule")
        foreign = FOREIGN_KEYS.intersection(*(group.keys() for group in state_dict["param_groups"]))
        if saved is None and foreign:
            raise ValueError(
                f"loaded state dict belongs to another optimizer: its groups have "
                f"{', '.join(sorted(foreign))}, and its learning rate would scale learned updates"
            )
        if saved is not None and saved != self._identity:
            raise ValueError(
                f"loaded state dict belongs to the update rule {saved['name']!r} "
                f"({saved['fingerprint']}), and this optimizer runs {self._identity['name']!r} "
                f"({self._identity['fingerprint']}): construct it with the same checkpoint"
            )

    def _matched(self, saved: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Own parameters with their saved state, by position; torch checks that lengths agree."""
        own = [param for group in self.param_groups for param in group["params"]]
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        for param, index in zip(own, ids, strict=False):
            yield param, saved["state"].get(index, {})

    def _check_state(self, saved: dict[str, Any]) -> None:
        """Refuse state that this optimizer's rule did not make, before any of it is loaded."""
        for param, state in self._matched(saved):
            if not state:
                continue
            fresh = self._init_state(param)
            expected = {key: tuple(value.shape) for key, value in fresh.items()}
            found = {k: tuple(v.shape) if isinstance(v, Tensor) else () for k, v in state.items()}
            if self.guard is None or SNAPSHOT not in found:  # a guard may come and go
                expected, found = (
                    {key: shape for key, shape in shapes.items() if key not in GUARD_KEYS}
                    for shapes in (expected, found)
                )
            if found != expected:
                raise ValueError(
                    f"loaded state dict does not fit the update rule {self.rule.name!r}: for a "
                    f"parameter of shape {tuple(param.shape)} it holds {found}, and the rule "
                    f"keeps {expected}"
                )

    def _restore_state(self, saved: dict[str, Any]) -> None:
        for param, state in self._matched(saved):
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    value = torch.tensor(float(value))
                per_coordinate = _per_coordinate(value, _real_shape(param))
                chosen = self._state_dtype_of(key) if per_coordinate else None
                moved = value.detach().to(param.device, chosen or value.dtype, copy=True)
                self.state[param][key] = moved
            if state:
                self._settle_guard_state(param)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and groups alone: the network would vanish in a copy.
        kept = {"rule": self.rule, "state_dtype": self.state_dtype, "guard": self.guard}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("guard", None)  # pickled before there were guards
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("weight_decay", 0.0)
        self._settle_guard()
        if "rule" in state:  # copied or unpickled; load_state_dict comes by here as well
            self._reset_caches()

    def __repr__(self) -> str:
        rule = f"{self._identity['name']} {self._identity['fingerprint']}"
        if self.guard is not None:
            rule += f"\n{self.guard}"
        # What the guard has seen is in guard_report, more legibly.
        lines = super().__repr__().replace(" (\n", f" (\nUpdate rule: {rule}\n", 1).split("\n")
        return "\n".join(line for line in lines if not line.startswith(f"    {WATCH}: "))


# ---- what the rule is told, and what is done with its answer


def _reader(dtype: torch.dtype, maximize: bool) -> Callable[[Tensor], Tensor]:
    """From (a piece of) a raw gradient to a new tensor: what the rule sees of it."""

    def read(grad: Tensor) -> Tensor:
        # NaN and infinity read as "nothing known about this coordinate", and what is finite
        # stays small enough to be squared; neither asks the device.
        grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)
        grad.clamp_(-LARGEST_GRAD, LARGEST_GRAD)
        return grad.neg_() if maximize else grad

    return read


def _rule_state(state: State, by_adam: bool) -> State:
    """What of the state is the rule's, or Adam's where it steps in."""
    if by_adam:
        return {own: state[key] for key, own in ADAM_KEYS.items()}
    return {k: v for k, v in state.items() if k != "step" and k not in GUARD_KEYS}


def _seen_loss(
    rule: UpdateRule, loss: float | Tensor | None, device: torch.device
) -> Tensor | None:
    """The loss, for a rule that reads it."""
    if not rule.needs_loss:
        return None
    seen = torch.as_tensor(loss, dtype=rule.dtype, device=device)
    return torch.nan_to_num(seen, nan=0.0, posinf=0.0, neginf=0.0)


def _add(param: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """``param += lr * update``"""
    if isinstance(lr, Tensor) or torch.compiler.is_compiling():
        param.add_(update * lr)
    else:
        param.add_(update, alpha=lr)


# ---- learning rates


def _readable(lr: Tensor) -> bool:
    """Whether the value can be read without waiting for a device or ending a compiled graph."""
    return lr.device.type == "cpu" and not torch.compiler.is_compiling()


def _unreadable(lr: float | Tensor) -> bool:
    """Whether the value is a device's secret."""
    return isinstance(lr, Tensor) and not _readable(lr)


def _known_zero(lr: float | Tensor) -> bool:
    """Whether ``lr`` is zero, as far as that can be told for free."""
    if isinstance(lr, Tensor):
        return _readable(lr) and float(lr) == 0.0
    return lr == 0.0


# ---- views of one parameter: the shard at hand, and complex numbers as pairs of reals


def _local(tensor: Any) -> Any:
    """The local shard of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _local_grad(grad: Any, param: Any) -> Tensor:
    """The shard of the gradient that belongs to the local shard of the parameter."""
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def _real(tensor: Tensor) -> Tensor:
    """Complex tensors of shape ``S`` as real views of shape ``(*S, 2)``; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _snapshot(state: dict[str, Any]) -> Tensor:
    """The guard's copy of a parameter, of the shape of the real view of the local shard."""
    return _local(state[SNAPSHOT]).squeeze(-1)


def _whole_tensor(param: Tensor) -> AbstractContextManager[None]:
    """The context in which a rule's per-tensor statistics speak of all of ``param``."""
    if not is_sharded(param):
        return nullcontext()
    return shards_of(param, _real_shape(param))


def _real_shape(param: Tensor) -> torch.Size:
    """Shape of the whole parameter as the rule sees it."""
    return torch.Size((*param.shape, 2)) if param.is_complex() else param.shape


def _per_coordinate(value: Tensor, shape: torch.Size) -> bool:
    """Whether a state entry has shape ``(*shape, k)`` rather than ``()`` or ``(k,)``."""
    return 0 < len(shape) == value.dim() - 1 and value.shape[:-1] == shape


def _shard_like(param: Any, local: Tensor) -> Tensor:
    """Per-coordinate state of the local shard as a DTensor cut the way ``param`` is."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*param.shape, *local.shape[param.dim() :]))
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
