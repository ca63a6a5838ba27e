"""The contract of an update rule: features without weights, a learned response, one step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from learned_optim._tensors import tensor_bytes
from learned_optim.kernels import StepSettings
from learned_optim.kernels.constants import DECAY_UNIT
from learned_optim.rules._segments import Product, Segments, segments_of
from learned_optim.rules._step import (
    BLOCK,
    MOST_PACKED,
    Piece,
    Shards,
    State,
    StepContext,
    StepFunction,
    pieces_of,
    restore_where_zero_,
    sanitize_grad,
    states_before,
    warmup_factor,
)

__all__ = ["RuleConfig", "State", "StepContext", "UpdateRule"]

#: Registered rules by name.
RULES: dict[str, type[UpdateRule]] = {}


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of every rule's configuration: frozen and JSON-serializable."""


class UpdateRule(nn.Module):
    """A function from the gradient history of parameter tensors to their updates.

    ``theta <- theta + lr * update`` (thesis eq. 3.2): the update already points downhill.

    All methods work on ``m`` tensors that are packed into ``n`` coordinates and described by
    :class:`~learned_optim.rules.Segments`. State entries are ``(n, k)``, per coordinate, or, where
    :attr:`tensor_state` names them, ``(m, k)``. A rule is a sequence of parts, of which a subclass
    defines those it needs; :meth:`forward` is their composition:

    ==========================  ============================================  ============
    :meth:`moments`             new running moments                            elementwise
    :meth:`products`            products to average over each tensor           elementwise
    :meth:`tensor_features`     features and statistics of whole tensors       no weights
    :meth:`coordinate_features` features of coordinates, directions            elementwise
    :meth:`respond`             gains of the directions                        all weights
    ==========================  ============================================  ============

    ``update[i] = sum_d directions[i, d] * gains[row(i), d]``, where rows are coordinates or
    tensors. Everything but the averages is elementwise, so large tensors are updated block by
    block. All weights are in :meth:`respond`, so meta-gradients run it alone again
    (:func:`learned_optim.meta.estimators.replay`). A rule that does not split into these parts
    overrides :meth:`forward`.

    A subclass sets ``name`` and ``Config``. Defining it registers it; a name that another class has
    is a ``ValueError``.

    Args:
        config: of type ``Config``; ``None`` for its defaults.
    """

    #: Name of the rule in the registry and in checkpoints.
    name: ClassVar[str] = ""
    #: Type of the configuration.
    Config: ClassVar[type[RuleConfig]] = RuleConfig
    #: Each coordinate or each tensor has gains; "none": the direction is the update.
    rows: ClassVar[Literal["coordinates", "tensors", "none"]] = "none"
    #: State entries that :meth:`respond` updates; :meth:`moments` updates all others.
    network_state: ClassVar[tuple[str, ...]] = ()
    #: State entries of whole tensors, ``(m, k)``; all others are per coordinate.
    tensor_state: ClassVar[tuple[str, ...]] = ()
    #: State entries that are matrices of a tensor, see :meth:`init_matrices`.
    matrix_state: ClassVar[tuple[str, ...]] = ()
    #: The update of a coordinate depends on its own history alone, not on its tensor.
    coordinatewise: ClassVar[bool] = True
    #: An exactly zero gradient history gives an exactly zero update.
    zero_preserving: ClassVar[bool] = False
    #: The rule reads ``context.total_steps`` and anneals its updates.
    reads_horizon: ClassVar[bool] = False
    #: Weight decay spares coordinates whose gradient is zero in this step.
    decays_live: ClassVar[bool] = False
    #: Steps of the optimizer's warm-up if the user sets none; part of the checkpoint.
    warmup_steps: int = 0
    #: Inner steps of the longest runs that the weights were trained on; ``None`` if unknown.
    trained_steps: int | None = None
    #: Configurations that the shared tests run over, the first with every part switched on; the
    #: default configuration if empty.
    test_configs: ClassVar[tuple[RuleConfig, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            return
        taken = RULES.get(cls.name, cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.__qualname__} cannot be named {cls.name!r}: {taken.__qualname__} of "
                f"{taken.__module__} is, and checkpoints know rules by name"
            )
        RULES[cls.name] = cls

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self._state_keys: tuple[str, ...] | None = None
        self.config: Any = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise TypeError(
                f"{type(self).__name__} takes a {self.Config.__name__}, "
                f"got {type(self.config).__name__}"
            )

    # ---- the parts

    @property
    def needs_loss(self) -> bool:
        """True if the rule reads ``context.loss`` (the optimizer takes it from its closure)."""
        return False

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the entries of :meth:`init_state`."""
        if self._state_keys is None:
            self._state_keys = tuple(self.init_state(torch.zeros(1)))
        return self._state_keys

    def init_state(self, param: Tensor) -> State:
        """State of one tensor before its first gradient.

        Returns:
            Tensors by name, in the rule's dtype and on ``param``'s device: ``(*param.shape, k)``,
            or ``(k,)`` for entries in :attr:`tensor_state`. Bias corrections need no entry: the
            number of updates is in :attr:`StepContext.step`.
        """
        return {}

    def init_matrices(self, shape: torch.Size, device: torch.device) -> State:
        """Entries in :attr:`matrix_state` of one tensor before its first gradient.

        Args:
            shape: of the tensor.
            device: of the tensor.

        Returns:
            Tensors by name, in the rule's dtype; only the entries that this tensor has.
        """
        return {}

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the state of a tensor of this shape; nothing is allocated."""
        param = torch.empty(shape, device="meta")
        state = {**self.init_state(param), **self.init_matrices(param.shape, param.device)}
        return sum(value.numel() * value.element_size() for value in state.values())

    def moments(self, grad: Tensor, state: State) -> State:
        """New values of the per-coordinate entries outside :attr:`network_state`; elementwise.

        Args:
            grad: shape ``(n,)``, finite, in the rule's dtype.
            state: before this gradient, in the rule's dtype.
        """
        return {}

    def products(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> Sequence[Product]:
        """Products whose means over each tensor :meth:`tensor_features` reads; elementwise.

        Args:
            grad: shape ``(n,)``.
            state: with the new :meth:`moments`.
            param: shape ``(n,)``, in the rule's dtype.
            segments: the tensors, of which ``grad`` may hold pieces.
            context: of these tensors.

        Returns:
            ``k`` pairs ``(a, b)`` of shapes ``(n,)``; ``(a, None)`` averages ``a`` itself.
        """
        return ()

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features of whole tensors; differentiable, without weights.

        Args:
            means: of :meth:`products`, shape ``(k, m)``.
            segments: the tensors.
            context: the step.

        Returns:
            ``(features, stats)``: input of :meth:`respond`, ``(m, f)``, if rows are tensors, else
            ``None``; and statistics for :meth:`coordinate_features`, ``(s, m)``, or ``None``.
        """
        return None, None

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Features of coordinates, and directions of their updates; elementwise.

        Args:
            grad: shape ``(n,)``.
            state: with the new :meth:`moments`.
            param: shape ``(n,)``.
            stats: of :meth:`tensor_features`, expanded to coordinates, ``(s, n)``.

        Returns:
            ``(features, directions)``: input of :meth:`respond`, ``(n, f)``, if rows are
            coordinates, else ``None``; and ``(n, d)``, or, if :attr:`rows` is "none", the update,
            ``(n, 1)``. Both are fastest with contiguous columns.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no coordinate_features")

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """The learned network over a sequence; differentiable in the weights.

        Args:
            features: shape ``(T, r, f)``: steps, rows, features.
            state: the entries in :attr:`network_state` before step 0, each ``(r, k)``.

        Returns:
            ``(gains, new_state)``: gains of the directions, ``(T, r, d)``; the network's entries
            after step T.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no respond")

    @torch.no_grad()
    def respond_(self, features: Tensor, state: State) -> Tensor:
        """One step of :meth:`respond` without a graph, in place in ``state``; ``(r, d)``.

        A rule may override it with a faster form; a test compares it with :meth:`respond`.
        """
        gains, new_state = self.respond(features.unsqueeze(0), state)
        for key, value in new_state.items():
            state[key].copy_(value)
        return gains[0]

    def default_weight_decay(self, total_steps: float | None) -> float:
        """Weight decay where the user sets none; ``total_steps`` is ``None`` if unknown."""
        return 0.0

    def scheduled_decay(
        self, weight_decay: float, states: Sequence[State], context: StepContext
    ) -> float | Tensor:
        """Weight decay at a step: one number, or one per tensor, ``(m,)``.

        Args:
            weight_decay: that of the parameter group.
            states: of each tensor before the step, with ``step`` and the entries in
                :attr:`tensor_state`, ``(k,)``.
            context: the step.
        """
        return weight_decay

    # ---- their composition

    def observe(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor | None, Tensor, State]:
        """The parts without weights: features ``(r, f)``, directions ``(n, d)``, new moments."""
        new = self.moments(grad, state)
        return *self.features(grad, {**state, **new}, param, segments, context), new

    def features(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor | None, Tensor]:
        """Input of :meth:`respond`, ``(r, f)``, and directions, ``(n, d)``, from new moments."""
        products = self.products(grad, state, param, segments, context)
        means = segments.mean_from_sums(segments.sums(products)) if products else grad[:0]
        of_tensors, stats = self.tensor_features(means, segments, context)
        expanded = None if stats is None else segments.expand(stats)
        of_coordinates, directions = self.coordinate_features(grad, state, param, expanded)
        return (of_coordinates if of_tensors is None else of_tensors), directions

    def mix(self, directions: Tensor, gains: Tensor | None, segments: Segments) -> Tensor:
        """The update ``(n,)`` from directions ``(n, d)`` and gains ``(r, d)``."""
        if gains is None:
            return directions[:, 0]
        if self.rows == "tensors" and len(segments) == 1:
            return directions.mv(gains[0])
        columns = gains.t() if self.rows == "coordinates" else segments.expand(gains.t())
        return (directions.t() * columns).sum(0)

    def forward(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, State]:
        """One inner step: updates to add to the parameters, and the state after it.

        Pure: nothing is changed in place. Differentiable in the rule's weights.

        Args:
            grad: shape ``(n,)``, in the rule's dtype.
            state: entries ``(n, k)``, or ``(m, k)`` if they belong to tensors.
            param: shape ``(n,)``.
            segments: which coordinate belongs to which tensor.
            context: number of the step, loss, and length of the run.

        Returns:
            ``(update, new_state)``; the update has shape ``(n,)``.
        """
        features, directions, new = self.observe(grad, state, param, segments, context)
        if features is None:
            return self.mix(directions, None, segments), new
        network = {key: state[key] for key in self.network_state}
        gains, network = self.respond(features.unsqueeze(0), network)
        return self.mix(directions, gains[0], segments), {**new, **network}

    # ---- the step in place

    @torch.no_grad()
    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        settings: StepSettings = StepSettings(),  # noqa: B008 (a tuple)
        shards: Shards | None = None,
        updates: Sequence[Tensor | None] | None = None,
    ) -> None:
        """One step in place: weight decay, state, parameters, and each state's ``"step"``.

        It runs the parts of :meth:`forward` over blocks with bounded temporaries. Rules with a
        kernel override it and fall back to it.

        Args:
            params: real tensors of one device, any floating dtype, any strides.
            grads: raw gradients, of the same shapes, any floating dtype.
            states: one dictionary per tensor, with ``"step"``, shape ``()``, and the entries of
                :meth:`init_state`, dtype float32, float64 or bfloat16; other keys are ignored.
                Entries in :attr:`tensor_state` are ``(k,)``.
            settings: learning rate and other numbers.
            shards: describes sharded tensors whose local parts are ``params``; ``None`` for
                whole tensors.
            updates: tensors that receive the updates of rotated matrices, whose parameters then
                only decay; ``None`` for the others, and for all if none is rotated.
        """
        if not params:
            return
        lr, dtype, device = settings.lr, self.dtype, params[0].device
        # Decay and update of half-precision parameters are one rounding.
        wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        targets = list(wide)
        for index, update in enumerate(updates or ()):
            if update is not None:
                targets[index] = update.zero_()
        segments = segments_of(
            tuple(p.shape for p in wide) if shards is None else tuple(shards.shapes),
            dtype,
            device,
            tuple(p.numel() for p in wide),
            () if shards is None else shards.groups,
        )
        before = states_before(lr, states, ("step", *self.state_keys))
        if isinstance(lr, Tensor):
            lr = lr.to(device).reshape(())
        steps = [state["step"] for state in states]
        step = torch.stack(steps).to(dtype)
        rotated = None
        if updates is not None:
            flags = [float(update is not None) for update in updates]
            rotated = torch.tensor(flags, dtype=dtype, device=device)
        loss = settings.loss if self.needs_loss else None
        context = StepContext(step, loss, settings.total_steps, rotated)
        if settings.weight_decay != 0:
            decay = self.scheduled_decay(settings.weight_decay, states, context)
            shrunk = decayed(self, wide, grads, DECAY_UNIT * lr * decay)
            for param, value in zip(wide, shrunk, strict=True):
                param.copy_(value)
        factor = warmup_factor(step, settings.warmup)
        by_parts = type(self).forward is UpdateRule.forward
        most_packed = MOST_PACKED if self.rows == "coordinates" else BLOCK
        pieces = pieces_of(wide, segments, most_packed, not by_parts and not self.coordinatewise)
        tensors = _Tensors(self, wide, grads, states, settings.maximize)
        updates_of = _updates_by_parts if by_parts else _updates_by_forward
        for piece, update in updates_of(tensors, pieces, segments, context):
            if factor is not None:
                update = update * piece.segments.expand(factor[piece.tensors])
            piece.add_(targets, update, lr)
        for param, value in zip(params, wide, strict=True):
            if value is not param:
                param.copy_(value)
        torch._foreach_add_(steps, 1)
        restore_where_zero_(lr, states, before)

    def bind(self, params: Sequence[Tensor], states: Sequence[State]) -> StepFunction | None:
        """A faster :meth:`step_` for these tensors; ``None`` if the rule has none.

        The optimizer calls it with gradients and settings while parameters, state entries and
        weights are the same objects. It returns true if it has made the step. It returns false, and
        has changed nothing, if :meth:`step_` must make it. A subclass that overrides :meth:`step_`
        overrides this as well.

        Args:
            params: whole, real tensors of one device.
            states: as for :meth:`step_`.
        """
        return None

    # ---- identity

    def init_from(self, other: UpdateRule) -> None:
        """Take the weights of another rule of the same kind and size.

        Raises:
            ValueError: ``other`` is another kind of rule, or its weights have other shapes.
        """
        own = {name: value.shape for name, value in self.state_dict().items()}
        weights = other.state_dict()
        if type(other) is not type(self) or own != {n: v.shape for n, v in weights.items()}:
            raise ValueError(
                f"a rule {self.name!r} with {self.config} cannot begin with the weights of a rule "
                f"{other.name!r} with {other.config}: they must be of one kind and size"
            )
        self.load_state_dict(weights)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the rule computes; float32 without weights."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready data."""
        return dataclasses.asdict(self.config)

    def fingerprint(self) -> str:
        """Hash of name, configuration and weight bits: 16 hex digits."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self.config_dict(), sort_keys=True).encode())
        for key, weight in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(weight))
        return digest.hexdigest()[:16]


def decayed(
    rule: UpdateRule, params: Sequence[Tensor], grads: Sequence[Tensor], decay: float | Tensor
) -> Iterator[Tensor]:
    """Parameters after weight decay by one number, or by one per tensor, ``(m,)``."""
    each = decay.expand(len(params)) if isinstance(decay, Tensor) else [decay] * len(params)
    for param, grad, own in zip(params, grads, each, strict=True):
        # On a GPU a factor of no dimensions would be rounded to half precision first.
        kind = own.dtype if isinstance(own, Tensor) else torch.float32
        wide = param.to(torch.promote_types(param.dtype, kind))
        factor = 1.0 - (own.to(wide.dtype) if isinstance(own, Tensor) else own)
        shrunk = wide * factor
        if rule.decays_live:
            shrunk = torch.where(sanitize_grad(grad, rule.dtype) != 0, shrunk, wide)
        yield shrunk


class _Tensors(NamedTuple):
    """The tensors of a call, packed piece by piece in the rule's dtype."""

    rule: UpdateRule
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[State]
    maximize: bool

    def load(self, piece: Piece, keys: Sequence[str]) -> tuple[Tensor, State, Tensor]:
        """Gradient ``(n,)``, state entries, and parameter ``(n,)``; views where possible."""
        dtype = self.rule.dtype
        grad = sanitize_grad(piece.pack(self.grads), dtype, self.maximize)
        return grad, self.state(piece, keys), piece.pack(self.params).to(dtype)

    def state(self, piece: Piece, keys: Sequence[str]) -> State:
        """State entries of a piece, ``(n, k)``, or ``(m, k)`` if they belong to tensors."""
        dtype, own = self.rule.dtype, self.states[piece.tensors]
        return {
            key: torch.stack([state[key] for state in own]).to(dtype)
            if key in self.rule.tensor_state
            else piece.pack_rows(self.states, key, dtype)
            for key in keys
        }

    def store_(self, piece: Piece, new: State) -> None:
        """Write state entries of a piece back."""
        for key, value in new.items():
            if key in self.rule.tensor_state:
                targets = [state[key] for state in self.states[piece.tensors]]
                torch._foreach_copy_(targets, list(value.unbind()))
            else:
                piece.unpack_rows_(self.states, key, value)


def _updates_by_parts(
    tensors: _Tensors, pieces: Sequence[Piece], segments: Segments, context: StepContext
) -> Iterator[tuple[Piece, Tensor]]:
    """Two passes: moments and means over whole tensors; then features, gains and updates."""
    rule = tensors.rule
    moments = [key for key in rule.state_keys if key not in rule.network_state]
    sums: list[Tensor] = []

    def observe_(piece: Piece) -> tuple[Tensor, State, Tensor]:
        grad, state, param = tensors.load(piece, moments)
        new = rule.moments(grad, state)
        tensors.store_(piece, new)
        return grad, {**state, **new}, param

    measures = type(rule).products is not UpdateRule.products
    only = observe_(pieces[0]) if len(pieces) == 1 else None  # one piece is loaded once
    for index, piece in enumerate(pieces if measures else ()):
        grad, state, param = only or observe_(piece)
        own = context.of(piece.tensors)
        part = piece.segments.sums(rule.products(grad, state, param, piece.segments, own))
        if sums and piece.first == pieces[index - 1].first:  # the tensor's next block
            sums[-1] = sums[-1] + part
        else:
            sums.append(part)
    means = segments.mean_from_sums(torch.cat(sums, 1)) if sums else segments.columns[:0]
    features, stats = rule.tensor_features(means, segments, context)
    whole = Piece(0, len(segments), None, segments)
    gains = None if features is None else _respond_(tensors, whole, features)
    for piece in pieces:
        grad, state, param = only or (tensors.load(piece, moments) if measures else observe_(piece))
        own_stats = None if stats is None else piece.segments.expand(stats[:, piece.tensors])
        rows, directions = rule.coordinate_features(grad, state, param, own_stats)
        if rows is not None:
            answer: Tensor | None = _respond_(tensors, piece, rows)
        else:
            answer = None if gains is None else gains[piece.tensors]
        yield piece, rule.mix(directions, answer, piece.segments)


def _respond_(tensors: _Tensors, piece: Piece, features: Tensor) -> Tensor:
    """Gains of the rows of a piece, ``(r, d)``, in place in the network's state."""
    network = tensors.state(piece, tensors.rule.network_state)
    gains = tensors.rule.respond_(features, network)
    tensors.store_(piece, network)
    return gains


def _updates_by_forward(
    tensors: _Tensors, pieces: Sequence[Piece], segments: Segments, context: StepContext
) -> Iterator[tuple[Piece, Tensor]]:
    """One pass, for rules that override :meth:`forward`."""
    for piece in pieces:
        grad, state, param = tensors.load(piece, tensors.rule.state_keys)
        own = context.of(piece.tensors)
        update, new = tensors.rule(grad, state, param, piece.segments, own)
        tensors.store_(piece, new)
        yield piece, update
