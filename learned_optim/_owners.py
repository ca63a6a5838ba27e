"""Sharded matrices with an owner: the one rank that keeps a matrix's state and steps it.

To rotate a matrix takes all of its gradient, of which a rank under `fully_shard` holds a part. So
parameters and gradients go to the owner and stepped parameters come back, as in the distributed
Muon of Dion (Ahn et al. 2025, arXiv 2504.05295). The step itself is that of a whole matrix.

Of ``n`` ranks one sends ``3 (n - 1) / n`` times its part of the parameters per step, in three
exchanges. To all-gather gradients and updates instead would be ``n`` times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from learned_optim._ambient import plain_arithmetic
from learned_optim._views import (
    local,
    local_grad,
    real,
    real_shape,
    shard_groups,
    shard_like,
    shard_of,
)
from learned_optim._warn import warn_once
from learned_optim.rules import StepSettings, UpdateRule
from learned_optim.rules._basis import matrix_shape
from learned_optim.rules._segments import is_sharded


class Cut(NamedTuple):
    """How a parameter is sharded.

    Attributes:
        group: process group that holds the parts.
        mesh_dim: the mesh's dimension of that group.
        dim: the parameter's dimension that is cut.
    """

    group: Any
    mesh_dim: int
    dim: int

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part of a whole tensor, as a view."""
        size = whole.shape[self.dim]
        rows = -(-size // self.group.size())
        start = min(size, rank * rows)
        return whole.narrow(self.dim, start, min(size, start + rows) - start)


def cut_of(param: Any) -> Cut | None:
    """The cut of a parameter; ``None`` unless exactly one dimension of a mesh cuts it."""
    if not is_sharded(param):
        return None
    cuts = [(i, place.dim) for i, place in enumerate(param.placements) if place.is_shard()]
    if len(cuts) != 1:
        return None
    ((mesh_dim, dim),) = cuts
    return Cut(param.device_mesh.get_group(mesh_dim), mesh_dim, dim % param.dim())


class Owners:
    """The owners of a rule's sharded matrices, balanced by the cost of their rotations.

    All ranks must ask for the same parameters in the same order.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._owners: dict[Tensor, tuple[Cut, int]] = {}
        self._loads: dict[Any, list[float]] = {}
        self._warned: set[str] = set()

    def assign(self, params: Sequence[Any]) -> None:
        """Give matrices that the rule rotates to the ranks with the least to do."""
        if not self._rule.matrix_state:
            return
        found = []
        for param in params:
            if param in self._owners or not is_sharded(param):
                continue
            shape = real_shape(param)
            if not self._rule.init_matrices(shape, torch.device("meta")):
                continue
            if (cut := cut_of(param)) is None:  # replicated, or cut several times
                if shard_groups(param):
                    warn_once(
                        self._warned,
                        "cut",
                        f"a parameter of shape {tuple(shape)} has placements {param.placements}: "
                        f"matrices that several mesh dimensions cut are stepped without an "
                        f"eigenbasis. Shard it over one mesh dimension to have it rotated",
                    )
                continue
            rows, cols = matrix_shape(shape)
            found.append((rows * cols * (rows + cols), cut, param))
        for cost, cut, param in sorted(found, key=lambda each: each[0], reverse=True):
            loads = self._loads.setdefault(cut.group, [0.0] * cut.group.size())
            rank = loads.index(min(loads))
            loads[rank] += cost
            self._owners[param] = cut, rank

    def has(self, param: Tensor) -> bool:
        """True if the parameter has an owner."""
        return param in self._owners

    def elsewhere(self, param: Tensor) -> bool:
        """True if another rank is the owner."""
        if param not in self._owners:
            return False
        cut, rank = self._owners[param]
        return bool(cut.group.rank() != rank)

    def owner(self, param: Tensor) -> tuple[Cut, int]:
        """The cut of a parameter that has an owner, and that rank."""
        return self._owners[param]

    def seen(self, param: Tensor, value: Any) -> Tensor:
        """A parameter, or its gradient: whole if it has an owner, else this rank's part.

        A collective call if it has an owner.
        """
        return real(value.full_tensor() if self.has(param) else local_grad(value, param))

    def spread(self, param: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """An owned matrix's state for a state dict. A collective call.

        Entries per coordinate are sharded like the parameter, square matrices by rows; small
        entries are whole.

        Args:
            param: has an owner.
            state: the owner's, without repeated rows; elsewhere what the rank has of it.
        """
        import torch.distributed as dist
        from torch.distributed.tensor import Replicate, Shard

        cut, owner = self._owners[param]
        source, rank = dist.get_global_rank(cut.group, owner), cut.group.rank()
        rule, result = self._rule, {"step": state["step"]}  # keys in one order on all ranks
        per_coordinate = {*rule.state_keys} - {*rule.tensor_state}
        keys = (*rule.state_keys, *rule.matrix_state)
        own = {key: state[key] for key in keys if key in state} if rank == owner else {}
        # The count of a basis is on the CPU, where some groups send nothing but objects.
        kinds = [{k: v.item() if v.numel() == 1 else (v.shape, v.dtype) for k, v in own.items()}]
        dist.broadcast_object_list(kinds, source, group=cut.group, device=param.device)
        for key, kind in kinds[0].items():
            if isinstance(kind, float):
                result[key] = torch.full((1, 1), kind)
                continue
            shape, dtype = kind
            if key in own:
                value = own[key].contiguous()
            else:
                value = torch.empty(shape, dtype=dtype, device=param.device)
            dist.broadcast(value, source, group=cut.group)
            if key in per_coordinate:
                value = shard_like(param, cut.part(value, rank).clone())
            elif key in rule.matrix_state:
                by_rows: list[Any] = [Replicate() for _ in param.placements]
                by_rows[cut.mesh_dim] = Shard(0)
                part = cut._replace(dim=0).part(value, rank).clone()
                value = shard_of(shape, part, param.device_mesh, by_rows)
            result[key] = value
        return {**result, **{key: value for key, value in state.items() if key not in keys}}

    def collect(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Undo :meth:`spread`: other ranks than the owner are left the number of steps.

        A collective call if entries are sharded. Entries of wrappers stay as they are.
        """
        own = {*self._rule.state_keys, *self._rule.matrix_state}
        whole = {
            key: value.full_tensor() if key in own and is_sharded(value) else value
            for key, value in saved.items()
        }
        return {k: v for k, v in whole.items() if not (k in own and self.elsewhere(param))}


class OwnersCall(NamedTuple):
    """The step of matrices with owners, in one process group and dtype.

    Attributes:
        rule: on the parameters' device.
        params: with gradients.
        states: as :meth:`UpdateRule.step_` takes them; elsewhere than at the owner ``step`` alone
            counts.
        staggers: of each parameter, as if all of the group's were stepped here.
        owners: of the parameters.
    """

    rule: Any
    params: list[Tensor]
    states: list[dict[str, Any]]
    staggers: list[int]
    owners: Owners

    @_disable_dynamo
    @torch.no_grad()
    def step_(self, settings: StepSettings, loss: object) -> None:
        """The rule's step in place, a collective call."""
        shards = [real(local(param)) for param in self.params]
        grads = [real(local_grad(param.grad, param)) for param in self.params]
        owned = [self.owners.owner(param) for param in self.params]
        exchange = _Exchange(owned, [real_shape(param) for param in self.params])
        wholes, whole_grads = exchange.gather(shards), exchange.gather(grads)
        if wholes:
            states = [self.states[index] for index in exchange.own]
            staggers = [self.staggers[index] for index in exchange.own]
            rotation = self.rule.rotation(wholes, states, staggers)
            with plain_arithmetic(wholes[0].device.type):
                self.rule.step_rotated_(rotation, whole_grads, states, settings)
        exchange.scatter_(wholes, shards)
        for index in {*range(len(self.params))} - {*exchange.own}:
            self.states[index]["step"] += settings.lr != 0


class _Exchange:
    """Tensors of one dtype between the ranks that hold parts of them and their owners.

    Args:
        owned: cut and owner of each tensor, cuts of one process group.
        shapes: of the whole tensors.

    Attributes:
        own: indices of the tensors of which this rank is the owner.
    """

    def __init__(self, owned: Sequence[tuple[Cut, int]], shapes: Sequence[torch.Size]) -> None:
        self._group, self._shapes = owned[0][0].group, shapes
        self._cuts = [cut for cut, _ in owned]
        owners = [owner for _, owner in owned]
        self._by_owner = sorted(range(len(owned)), key=owners.__getitem__)
        self._rank, self._size = self._group.rank(), self._group.size()
        self.own = [index for index, owner in enumerate(owners) if owner == self._rank]
        self._owners = owners

    def _parts(self, wholes: Sequence[Tensor]) -> Iterator[Tensor]:
        """Parts of the owned tensors, views, by the rank that holds them."""
        for rank in range(self._size):
            for index, whole in zip(self.own, wholes, strict=True):
                yield self._cuts[index].part(whole, rank)

    def _sizes(self, shards: Sequence[Tensor], parts: Sequence[Tensor]) -> tuple[list[int], ...]:
        """Elements of shards by owner, and of parts by holder."""
        outside = [0] * self._size
        for index, shard in enumerate(shards):
            outside[self._owners[index]] += shard.numel()
        count = len(self.own)
        numels = [part.numel() for part in parts]
        inside = [sum(numels[rank * count : (rank + 1) * count]) for rank in range(self._size)]
        return outside, inside

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors of which this rank is the owner, from everybody's shards."""
        wholes = [shards[index].new_empty(self._shapes[index]) for index in self.own]
        parts = list(self._parts(wholes))
        outside, inside = self._sizes(shards, parts)
        packed = torch.cat([shards[index].reshape(-1) for index in self._by_owner])
        received = self._send(packed, outside, inside)
        _unpack_(received, parts)
        return wholes

    def scatter_(self, wholes: Sequence[Tensor], shards: Sequence[Tensor]) -> None:
        """Write the owners' whole tensors to everybody's shards."""
        parts = list(self._parts(wholes))
        outside, inside = self._sizes(shards, parts)
        empty = shards[0].new_empty(0)
        packed = torch.cat([empty, *(part.reshape(-1) for part in parts)])
        received = self._send(packed, inside, outside)
        _unpack_(received, [shards[index] for index in self._by_owner])

    def _send(self, packed: Tensor, sizes: list[int], received: list[int]) -> Tensor:
        out = packed.new_empty(sum(received))
        torch.distributed.all_to_all_single(out, packed, received, sizes, group=self._group)
        return out


def _unpack_(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    pieces = packed.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))
