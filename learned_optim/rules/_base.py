"""The contract of an update rule: a pure function from gradient and state to update and state."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learned_optim._bytes import tensor_bytes
from learned_optim._discovery import import_submodules, unknown_name

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of every rule's configuration: frozen and JSON-serializable."""


# Rows per block of the in-place path: few enough that gates and states stay in the cache, enough
# that the calls cost little. 4,096 coordinates of a 20-unit LSTM have 80 floats of gates each.
BLOCK_ROWS = 1 << 12


def as_it_is(grad: Tensor) -> Tensor:
    return grad


_RULES: dict[str, type[UpdateRule]] = {}


class UpdateRule(nn.Module):
    """What computes one parameter tensor's update from its gradient history.

    ``theta <- theta + lr * update`` (thesis eq. 3.2): the update already points downhill.

    A subclass names itself with ``name``, declares its frozen, JSON-serializable dataclass as
    ``Config``, and is registered by being defined in a module of ``learned_optim.rules``.

    Args:
        config: rebuilds the rule, together with its weights; ``None`` takes the defaults.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[RuleConfig]] = RuleConfig

    #: Every coordinate is treated alike and alone: tensors may be flattened and concatenated
    #: without changing any update. Rules with per-tensor statistics or per-tensor state say False.
    coordinatewise: ClassVar[bool] = True
    #: Tensors with fewer coordinates than this are cheaper updated by :meth:`update_many_`.
    pack_below: ClassVar[int] = 0
    #: An exactly zero gradient history gives an exactly zero update. Promised, and tested.
    zero_preserving: ClassVar[bool] = False

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self.config: Any = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise TypeError(
                f"{type(self).__name__} takes a {self.Config.__name__}, "
                f"got {type(self.config).__name__}"
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            return
        taken = _RULES.get(cls.name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"{cls.__qualname__} cannot be named {cls.name!r}: {taken.__qualname__} of "
                f"{taken.__module__} is, and checkpoints know rules by name"
            )
        _RULES[cls.name] = cls

    @property
    def needs_loss(self) -> bool:
        """Whether ``forward`` must be given the loss (the optimizer takes it from its closure)."""
        return False

    @abstractmethod
    def init_state(self, param: Tensor) -> State:
        """State before the first gradient of ``param``.

        Returns:
            Tensors by name. Per-coordinate state has shape ``(*param.shape, k)``, per-tensor
            state ``()`` or ``(k,)``; dtype is the rule's (see :attr:`dtype`), device ``param``'s.
            Built from ``zeros_like(param)``, so that a sharded parameter has sharded state.
        """

    @abstractmethod
    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One inner step: the update to add to ``param``, and the state after it.

        Pure: nothing is changed in place. Differentiable in the rule's weights.

        Args:
            grad: gradient, shape and device of ``param``, in the rule's dtype.
            state: as :meth:`init_state` or the previous call returned it.
            param: the parameter's value, read only.
            loss: the loss at ``param``, shape ``()``; only rules with :attr:`needs_loss` read it.

        Returns:
            ``(update, new_state)``; the update has the shape of ``param``.
        """

    @torch.no_grad()
    def update_(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """:meth:`forward` without a graph, writing the new state into ``state``'s tensors."""
        if torch.compiler.is_compiling():
            return self._plain_(grad, state, param, loss)
        n, update = grad.numel(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        for _, rows, part in self.update_blocks_([grad], [state], [param], loss):
            if len(part) == n:
                return part.view(grad.shape)
            update.view(-1)[rows] = part
        return update

    @torch.no_grad()
    def update_blocks_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        read: Callable[[Tensor], Tensor] = as_it_is,
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """:meth:`update_` of several tensors of any size, in pieces: never all of one at once.

        The optimizer and the rollouts of meta-training call this. Rules override it with a fast
        path, which a test holds against :meth:`forward`.

        Args:
            grads: as for :meth:`forward`, or what ``read`` turns into it.
            params: as for :meth:`forward`, in any dtype. Rows that were yielded may be changed
                before the next are asked for.
            read: applied to each piece of a gradient before use; elementwise, and cheap, for it
                may be applied more than once.

        Yields:
            ``(index, rows, update)``: which tensor, consecutive rows of it when flattened, and
            their update.
        """
        for index, (grad, state, param) in enumerate(zip(grads, states, params, strict=True)):
            update = self._plain_(read(grad), state, param.to(self.dtype), loss)
            yield index, slice(0, grad.numel()), update.reshape(-1)

    @torch.no_grad()
    def update_many_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        record: bool = False,
    ) -> tuple[list[Tensor], Any]:
        """:meth:`update_` of several tensors, which rules override with one pass over all of them.

        Args:
            record: also return what replay needs of this step, if the rule can be replayed.

        Returns:
            ``(updates, record)``: an update per tensor, and the record, or ``None``.
        """
        every = zip(grads, states, params, strict=True)
        return [self.update_(*each, loss) for each in every], None

    def _plain_(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """:meth:`update_` in one piece, by :meth:`forward` itself."""
        with torch.no_grad():
            # Half-precision state is storage alone: the rule computes in its own dtype.
            given = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in state.items()}
            update, new_state = self(grad, given, param, loss)
            for key, value in new_state.items():
                state[key].copy_(value)
        return update

    def adopt(self, other: UpdateRule) -> None:
        """Begin with the weights of another rule of this kind; those it lacks stay as they are.

        Where :meth:`_widened` says how, ``other`` may have fewer units: the rule then computes what
        it computes, until training finds a use for the others.

        Raises:
            ValueError: ``other`` is another kind of rule, or has weights that fit nowhere.
        """
        own, misfits = self.state_dict(), []
        for name, value in other.state_dict().items():
            if name in own and own[name].shape != value.shape:
                value = self._widened(name, own[name], value)
            if name not in own or value is None:
                misfits.append(name)
            else:
                own[name] = value
        if type(other) is not type(self) or misfits:
            raise ValueError(
                f"a rule {self.name!r} with {self.config} cannot begin with the weights of a rule "
                f"{other.name!r} with {other.config}: it has no place for "
                f"{', '.join(misfits) or 'them'}"
            )
        self.load_state_dict(own)

    def _widened(self, name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
        """``own`` with the weights of fewer units in their places, or ``None`` if it has none."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the rule computes in: that of its weights, float32 for a rule without any."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready data."""
        return dataclasses.asdict(self.config)

    def fingerprint(self) -> str:
        """Identity of this rule: 16 hex digits over its name, configuration and weight bits."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self.config_dict(), sort_keys=True).encode())
        for key, weight in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(weight))
        return digest.hexdigest()[:16]


class RecurrentRule(UpdateRule):
    """A rule that splits into weight-free observation and a learned response to it.

    The split is what makes meta-gradients by replay possible: :meth:`observe` runs once, without
    a graph, during the rollout; :meth:`respond` is run again over the recorded signals, with one.
    """

    pack_below = 1 << 12
    #: State entries that belong to the network; :meth:`observe` owns all others.
    network_state: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def observe(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What the network sees of this step. Arguments as for :meth:`forward`.

        Returns:
            ``(signals, new_state)``: signals of shape ``(*param.shape, k)``; the entries of the
            state that observation owns (running moments), empty where there are none.
        """

    @abstractmethod
    def respond(self, signals: Tensor, state: State) -> tuple[Tensor, State]:
        """The learned network over a sequence of signals, differentiable in the weights.

        Args:
            signals: shape ``(T, n, k)``: steps, coordinates, features.
            state: the network's own entries before step 0, each of shape ``(n, k)``.

        Returns:
            ``(updates, new_state)``: updates of shape ``(T, n)``; the network's own entries after
            step T.
        """

    @torch.no_grad()
    def respond_(self, signals: Tensor, state: State) -> Tensor:
        """One step of :meth:`respond` without a graph, on a block of rows, in place in ``state``.

        Args:
            signals: shape ``(n, k)``; n is at most :data:`BLOCK_ROWS`.
            state: the network's own entries in the rule's dtype, each of shape ``(n, k)``.

        Returns:
            Updates of shape ``(n,)``.
        """
        updates, new_state = self.respond(signals.unsqueeze(0), state)
        for key, value in new_state.items():
            state[key].copy_(value)
        return updates[0]

    @torch.no_grad()
    def observe_(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """:meth:`observe` without a graph, in place in ``state``; returns the signals."""
        signals, new_state = self.observe(grad, state, param, loss)
        for key, value in new_state.items():
            state[key].copy_(value)
        return signals

    @torch.no_grad()
    def update_many_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        record: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """:meth:`update_` of several tensors through one pass of the network.

        Returns:
            ``(updates, signals)``: the record is what the network saw, ``(n, k)``.
        """
        if self.coordinatewise:  # whatever is observed: it does not matter whose coordinates
            packed, unpack_ = pack_rows(states, tuple(states[0]))
            signals = self.observe_(flat(grads), packed, flat(params), loss)
        else:
            packed, unpack_ = pack_rows(states, self.network_state)
            each = zip(grads, states, params, strict=True)
            seen = [self.observe_(*one, loss) for one in each]
            signals = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
        update = self.respond_to_all_(signals, packed)
        unpack_()
        return split_like(update, grads), signals if record else None

    @torch.no_grad()
    def respond_to_all_(self, signals: Tensor, state: State) -> Tensor:
        """:meth:`respond_` over any number of rows, block by block.

        Args:
            signals: shape ``(n, k)``.
            state: the whole state; the network's own entries are changed in place, whatever
                their dtype.

        Returns:
            Updates of shape ``(n,)``.
        """
        rows = {key: as_rows(state[key]) for key in self.network_state}
        update = signals.new_empty(len(signals))
        for block in blocks(len(signals)):
            part = {key: value[block] for key, value in rows.items()}
            update[block] = self._respond_block_(signals[block], part)
        return update

    def _respond_block_(self, signals: Tensor, state: State) -> Tensor:
        """:meth:`respond_` where ``state`` may be half."""
        work = {key: state[key].to(signals.dtype) for key in self.network_state}
        update = self.respond_(signals, work)
        for key, value in work.items():
            if value is not state[key]:
                state[key].copy_(value)
        return update

    @torch.no_grad()
    def update_blocks_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        read: Callable[[Tensor], Tensor] = as_it_is,
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """:meth:`forward` in place and block by block, so that temporaries stay in the cache."""
        several_losses = loss is not None and loss.dim() > 0
        if not self.coordinatewise or several_losses:
            yield from super().update_blocks_(grads, states, params, loss, read)
            return
        dtype = self.dtype
        for index, (grad, state, param) in enumerate(zip(grads, states, params, strict=True)):
            flat_grad, flat_param = grad.reshape(-1), param.reshape(-1)
            rows = {key: as_rows(value) for key, value in state.items()}
            for block in blocks(len(flat_grad)):
                part = {key: value[block] for key, value in rows.items()}
                seen = flat_param[block].to(dtype)
                signals = self.observe_(read(flat_grad[block]), part, seen, loss)
                yield index, block, self._respond_block_(signals, part)


class TensorRule(UpdateRule):
    """A rule with one network per tensor, whose output are gains of per-coordinate directions.

    Weight-free observation and a learned response, as in :class:`RecurrentRule`; a response is to
    a whole tensor, so that meta-gradients by replay need no sampling of coordinates.
    """

    #: State entries that belong to the network; observation owns all others.
    network_state: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def observe_many_(
        self, grads: Sequence[Tensor], states: Sequence[State], params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What does not depend on the weights, for ``m`` tensors of ``n`` coordinates in all.

        In place in what observation owns of ``states``.

        Returns:
            ``(features, scale, directions)`` of shapes ``(m, k)``, ``(m,)`` and ``(n, d)``.
        """

    @abstractmethod
    def gains(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """The learned network over a sequence, differentiable in the weights.

        Args:
            features: shape ``(T, m, k)``: steps, tensors, features.
            state: the network's own entries before step 0, each of shape ``(m, ·)``.

        Returns:
            ``(gains, new_state)``: gains of the directions in units of the scale, ``(T, m, d)``;
            the network's own entries after step T.
        """

    @torch.no_grad()
    def update_many_(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        params: Sequence[Tensor],
        loss: Tensor | None = None,
        record: bool = False,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """:meth:`update_` of several tensors at once.

        Returns:
            ``(updates, record)``: an update per tensor; the features ``(m, k)`` and the scaled
            directions ``(n, d)``, whose product with the gains the updates are.
        """
        features, scale, directions = self.observe_many_(grads, states, params)
        own = {key: [state[key] for state in states] for key in self.network_state}
        gains, network = self.gains(
            features.unsqueeze(0), {key: torch.stack(values) for key, values in own.items()}
        )
        for key, values in own.items():
            torch._foreach_copy_(values, list(network[key].unbind()))
        sizes = [grad.numel() for grad in grads]
        owner = tensor_of_each(sizes, features.device)
        scaled = directions * scale[owner].unsqueeze(-1)
        updates = (scaled * gains[0][owner]).sum(-1)
        return split_like(updates, grads), (features, scaled) if record else None


def tensor_of_each(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Of tensors flattened behind each other, the index of the one a coordinate is of: ``(n,)``."""
    counts = torch.tensor(sizes, device=device)
    return torch.arange(len(sizes), device=device).repeat_interleave(counts)


def blocks(n: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """``n`` rows in blocks of ``size``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def zeros_by_feature(param: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``(*param.shape, k)``, of which each of the ``k`` lies contiguous in memory.

    What is done to one of them for all coordinates then runs along memory.
    """
    like = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    return like.unsqueeze(0).repeat(k, *(1,) * param.dim()).movedim(0, -1)


def pack_rows(states: Sequence[State], keys: Sequence[str]) -> tuple[State, Callable[[], None]]:
    """Per-coordinate entries of several states as one state ``(n, k)``.

    Returns:
        ``(packed, unpack_)``: the call writes ``packed`` back into the states.
    """
    own = {key: [as_rows(state[key]) for state in states] for key in keys}
    # Laid out as zeros_by_feature does.
    packed = {key: torch.cat([r.t() for r in rows], 1).t() for key, rows in own.items()}

    def unpack_() -> None:
        for key, rows in own.items():
            torch._foreach_copy_(rows, list(packed[key].split([len(r) for r in rows])))

    return packed, unpack_


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors flattened behind each other, ``(n,)``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split_like(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The pieces that :func:`flat` put together, with the shapes of ``tensors``."""
    pieces = values.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def as_rows(value: Tensor) -> Tensor:
    """State ``(*S, k)`` as ``(n, k)``, also where ``n`` is 0: a view, to be written through."""
    return value.view(math.prod(value.shape[:-1]), value.shape[-1])


def rule_class(name: str) -> type[UpdateRule]:
    """The update rule registered under ``name``.

    Raises:
        ValueError: no rule has that name; the message lists those that exist.
    """
    known = rule_names()
    if name not in known:
        raise unknown_name("update rule", name, known)
    return _RULES[name]


def rule_names() -> list[str]:
    """Names of all registered update rules."""
    list(import_submodules("learned_optim.rules"))
    return sorted(_RULES)


def rule_for(config: RuleConfig) -> UpdateRule:
    """A rule with fresh weights for a configuration: its type tells which rule.

    Raises:
        TypeError: no rule, or more than one, is configured by this type.
    """
    fitting = [name for name in rule_names() if _RULES[name].Config is type(config)]
    if len(fitting) != 1:
        which = f"{', '.join(fitting)} are all" if fitting else "no update rule is"
        raise TypeError(
            f"{which} configured by {type(config).__name__}: give every rule a Config of its own"
        )
    return _RULES[fitting[0]](config)


def build_rule(name: str, config: dict[str, Any]) -> UpdateRule:
    """A rule with fresh weights from its registered name and its configuration as plain data.

    Raises:
        ValueError: unknown name, or a configuration with unknown or missing fields.
    """
    cls = rule_class(name)
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        # The first weights are about to be replaced: drawing them must not move the generator
        # that the caller's own initialization, dropout and shuffling draw from.
        with torch.random.fork_rng(devices=[]):
            return cls(cls.Config(**values))
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(cls.Config))
        raise ValueError(
            f"configuration {config} does not fit update rule {name!r} (fields: {fields}): {error}"
        ) from error
