"""The contract of an update rule: weight-free observation, a learned response, one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from learned_optim.rules import _step
from learned_optim.rules._config import ConfiguredModule, RuleConfig, register
from learned_optim.rules._context import BoundStep, State, StepContext, StepSettings
from learned_optim.rules._segments import Product, Segments

__all__ = ["BoundStep", "State", "StepContext", "UpdateRule"]


class UpdateRule(ConfiguredModule):
    """A function from the gradient history of parameter tensors to their updates.

    ``theta <- theta + lr * update`` (thesis eq. 3.2): the update already points downhill.

    All methods work on ``m`` tensors that are packed into ``n`` coordinates and described by
    :class:`~learned_optim.rules.Segments`. State entries are ``(n, k)``, per coordinate, or, where
    :attr:`tensor_state` names them, ``(m, k)``. A rule is a sequence of parts, of which a subclass
    defines those it needs; :meth:`forward` is their composition:

    ==========================  ============================================  ============
    :meth:`moments`             new running moments                            elementwise
    :meth:`products`            what is averaged over each tensor              elementwise
    :meth:`tensor_features`     features and statistics of whole tensors       no weights
    :meth:`coordinate_features` features of coordinates, directions            elementwise
    :meth:`respond`             gains of the directions                        all weights
    ==========================  ============================================  ============

    ``update[i] = sum_d directions[i, d] * gains[row(i), d]``, where rows are coordinates or
    tensors. Since everything but the averages is elementwise, tensors of any size are updated
    block by block; since all weights are in :meth:`respond`, meta-gradients need only that to be
    run again (:func:`learned_optim.meta.estimators.replay`). A rule of another kind overrides
    :meth:`forward` itself.

    A subclass names itself with ``name``, declares its frozen, JSON-serializable dataclass as
    ``Config``, and is registered by being defined.

    Args:
        config: rebuilds the rule, together with its weights; ``None`` takes the defaults.
    """

    #: What has gains of its own: each coordinate, each tensor, or, for a rule whose directions
    #: already are the update, nothing.
    rows: ClassVar[Literal["coordinates", "tensors", "none"]] = "none"
    #: State entries that :meth:`respond` owns, one row per row; :meth:`moments` owns all others.
    network_state: ClassVar[tuple[str, ...]] = ()
    #: State entries of whole tensors, ``(m, k)``; all others are per coordinate.
    tensor_state: ClassVar[tuple[str, ...]] = ()
    #: State entries that are matrices of a tensor, see :meth:`init_matrices`.
    matrix_state: ClassVar[tuple[str, ...]] = ()
    #: Every coordinate is treated alike and alone: an update does not depend on which tensor a
    #: coordinate belongs to. Promised, and tested.
    coordinatewise: ClassVar[bool] = True
    #: An exactly zero gradient history gives an exactly zero update. Promised, and tested.
    zero_preserving: ClassVar[bool] = False
    #: The rule reads ``context.total_steps`` and anneals its updates by itself.
    reads_horizon: ClassVar[bool] = False
    #: Weight decay spares coordinates whose gradient is zero in this step.
    decays_live: ClassVar[bool] = False
    #: Steps of warm-up that the optimizer applies unless it is told another number. Weights that
    #: need it carry it in their checkpoint.
    warmup_steps: int = 0
    #: Inner steps of the longest runs that the weights were trained on; ``None`` if unknown.
    trained_steps: int | None = None
    #: Configurations that the shared tests run over: the first with every part switched on, further
    #: ones that differ in kind; the default configuration if there are none.
    test_configs: ClassVar[tuple[RuleConfig, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            register(cls)

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

    # ---- the parts

    def init_state(self, param: Tensor) -> State:
        """State of one tensor before its first gradient.

        Returns:
            Tensors by name, in the rule's dtype and on ``param``'s device: ``(*param.shape, k)``,
            or ``(k,)`` for entries in :attr:`tensor_state`. Bias corrections need no entry: the
            number of updates is in :attr:`StepContext.step`.
        """
        return {}

    def init_matrices(
        self, shape: torch.Size, device: torch.device, sharded: Sequence[int] = ()
    ) -> State:
        """Entries in :attr:`matrix_state` of one tensor before its first gradient.

        Args:
            shape: of the whole tensor.
            device: of the tensor.
            sharded: dimensions of which this process has a part.

        Returns:
            Tensors by name, in the rule's dtype; those that the tensor does not have are left out.
        """
        return {}

    def moments(self, grad: Tensor, state: State) -> State:
        """New values of the per-coordinate entries that observation owns; elementwise.

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
            segments: the tensors at hand, which may be pieces of whole ones.
            context: theirs.

        Returns:
            ``k`` pairs ``(a, b)`` of shapes ``(n,)``; ``(a, None)`` averages ``a`` itself.
        """
        return ()

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is known of whole tensors; differentiable, without weights.

        Args:
            means: of :meth:`products`, shape ``(k, m)``.
            segments: the tensors.
            context: the step.

        Returns:
            ``(features, stats)``: input of :meth:`respond`, ``(m, f)``, if rows are tensors, else
            ``None``; and what :meth:`coordinate_features` reads of a coordinate's tensor,
            ``(s, m)``, or ``None``.
        """
        return None, None

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """What is known of coordinates, and the directions of their updates; elementwise.

        Args:
            grad: shape ``(n,)``.
            state: with the new :meth:`moments`.
            param: shape ``(n,)``.
            stats: those of the coordinate's tensor, ``(s, n)``.

        Returns:
            ``(features, directions)``: input of :meth:`respond`, ``(n, f)``, if rows are
            coordinates, else ``None``; and ``(n, d)``, or the update itself, ``(n, 1)``, if there
            are no rows. Fast where each column is contiguous in memory.
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

        A rule may override it with a faster form, which a test holds against :meth:`respond`.
        """
        gains, new_state = self.respond(features.unsqueeze(0), state)
        for key, value in new_state.items():
            state[key].copy_(value)
        return gains[0]

    def default_weight_decay(self, total_steps: float | None) -> float:
        """Weight decay of users who give none, in a run of that length or of unknown length."""
        return 0.0

    def scheduled_decay(
        self, weight_decay: float, states: Sequence[State], context: StepContext
    ) -> float | Tensor:
        """Weight decay at a step, of all tensors or of each, ``(m,)``: rules may schedule it.

        ``states`` hold ``step`` and the entries in :attr:`tensor_state`, ``(k,)``, before it.
        """
        return weight_decay

    # ---- their composition

    def observe(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor | None, Tensor, State]:
        """Everything that does not depend on the weights. Arguments as for :meth:`forward`.

        Returns:
            ``(features, directions, moments)``: ``(r, f)``, ``(n, d)``, and the new moments.
        """
        new = self.moments(grad, state)
        seen = {**state, **new}
        products = self.products(grad, seen, param, segments, context)
        means = segments.mean_from_sums(segments.sums(products)) if products else grad[:0]
        features, stats = self.tensor_features(means, segments, context)
        spread = None if stats is None else segments.expand(stats)
        rows, directions = self.coordinate_features(grad, seen, param, spread)
        return (rows if features is None else features), directions, new

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
        if self.rows == "none" or features is None:
            return self.mix(directions, None, segments), new
        network = {key: state[key] for key in self.network_state}
        gains, network = self.respond(features.unsqueeze(0), network)
        return self.mix(directions, gains[0], segments), {**new, **network}

    @torch.no_grad()
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
        """One step in place: weight decay, state, parameters, and each state's ``"step"``.

        This is the only in-place path. It runs the parts of :meth:`forward` over blocks with
        bounded temporaries. A rule with a kernel overrides it and falls back to this one.

        Args:
            params: real tensors of one device, any floating dtype, any strides.
            grads: raw gradients, of the same shapes, any floating dtype.
            states: one dictionary per tensor, with ``"step"``, shape ``()``, and the entries of
                :meth:`init_state`, dtype float32, float64 or bfloat16; other keys are ignored.
                Entries in :attr:`tensor_state` are ``(k,)``.
            lr: multiplier of the update; a tensor has one element on the device or the CPU.
            weight_decay: ``param *= 1 - 1e-3 * lr * weight_decay`` before the update, with what
                :meth:`scheduled_decay` makes of it.
            maximize: negate the gradients.
            warmup: updates are multiplied by ``min(1, (step + 1) / warmup)``.
            loss: see :attr:`StepContext.loss`.
            total_steps: see :attr:`StepContext.total_steps`.
            shapes: shapes of the whole tensors where ``params`` are shards of them.
            shard_groups: process groups over which all of ``params`` are sharded.
        """
        settings = StepSettings(lr, weight_decay, maximize, warmup, total_steps)
        _step.reference_step_(self, params, grads, states, settings, loss, shapes, shard_groups)

    def bind_step(self, params: Sequence[Tensor], states: Sequence[State]) -> BoundStep | None:
        """:meth:`step_` of these very tensors, if the rule can prepare a faster one.

        The optimizer calls it instead while parameters and state entries are the same objects. A
        subclass that overrides :meth:`step_` must not inherit another one's.

        Args:
            params: whole, real tensors of one device.
            states: as for :meth:`step_`.
        """
        return None
