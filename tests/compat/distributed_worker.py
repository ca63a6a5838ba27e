"""What the two processes of ``test_distributed.py`` do; run as ``RANK=r ... -m``, with a folder.

Every scenario leaves one file ``<name>.pt`` of whole tensors, written by rank 0.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from learned_optim import LearnedOptimizer

from .common import SCENARIO_RULES, leave, make_rule, small_batch, small_net

SETTINGS: dict[str, Any] = {"lr": 0.5, "weight_decay": 1.0}
FULL = StateDictOptions(full_state_dict=True)


def local_steps(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    """Training steps in which every rank sees its half of the batch."""
    x, y = small_batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
        opt.step()


def whole(value: Tensor) -> Tensor:
    """The unsharded value; a collective call for a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def whole_state(opt: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return [{key: whole(value) for key, value in opt.state[p].items()} for p in params]


def sharded(
    rule: str, mesh: DeviceMesh, seed: int = 0, **settings: Any
) -> tuple[nn.Module, LearnedOptimizer]:
    model = small_net(seed)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, LearnedOptimizer(model.parameters(), make_rule(rule), **{**SETTINGS, **settings})


def ddp(rule: str) -> dict[str, Any]:
    model = DistributedDataParallel(small_net())
    opt = LearnedOptimizer(model.parameters(), make_rule(rule), **SETTINGS)
    local_steps(model, opt, 6)
    return {"params": [whole(p) for p in model.parameters()], "state": whole_state(opt)}


def zero(rule: str) -> dict[str, Any]:
    """Every rank keeps the state of its own parameters; rank 0 collects it."""
    model = DistributedDataParallel(small_net())
    opt = ZeroRedundancyOptimizer(
        model.parameters(), LearnedOptimizer, rule=make_rule(rule), **SETTINGS
    )
    local_steps(model, opt, 6)
    own = len(opt.optim.state)
    opt.consolidate_state_dict(to=0)
    state = opt.state_dict()["state"] if dist.get_rank() == 0 else {}
    return {
        "params": [whole(p) for p in model.parameters()],
        "state": [state[index] for index in sorted(state)],
        "own": own,
    }


def fsdp2(rule: str, mesh: DeviceMesh, **settings: Any) -> dict[str, Any]:
    """The state must be cut exactly like its parameter, of which rank 0 holds a part."""
    model, opt = sharded(rule, mesh, **settings)
    local_steps(model, opt, 6)
    layouts = []
    for p in model.parameters():
        for key, value in opt.state[p].items():
            cut = isinstance(value, DTensor)
            same = cut and value.placements == p.placements and value.device_mesh == p.device_mesh
            shapes = (tuple(value.shape), tuple(value.to_local().shape) if cut else None)
            layouts.append((key, tuple(p.shape), tuple(p.to_local().shape), cut, same, *shapes))
    return {
        "params": [whole(p) for p in model.parameters()],
        "state": whole_state(opt),
        "layouts": layouts,
    }


def compiled(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    model, opt = sharded(rule, mesh, lr=torch.tensor(0.5))
    opt.step = torch.compile(opt.step, backend="aot_eager")  # type: ignore[method-assign]
    local_steps(model, opt, 6)
    return {"params": [whole(p) for p in model.parameters()]}


def bad_batch(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    """One rank's gradient shard turns NaN once; both go on and agree."""
    model, opt = sharded(rule, mesh)
    local_steps(model, opt, 2)
    if dist.get_rank() == 1:
        for p in model.parameters():
            p.grad.to_local().fill_(float("nan"))
    opt.step()
    local_steps(model, opt, 3)
    return {"params": [whole(p) for p in model.parameters()], "state": whole_state(opt)}


def checkpoints(rule: str, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Train on 2 ranks, go on on 1, go on on 2 again; and once more from the full state dict."""
    model, opt = sharded(rule, mesh)
    local_steps(model, opt, 3)
    saved = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt),
    }
    dcp.save(saved, checkpoint_id=folder / "two")
    live = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, opt, options=FULL),
    }
    full = copy.deepcopy(live)  # counters in it are the optimizer's own, as with torch.optim
    local_steps(model, opt, 6)
    result = {"uninterrupted": [whole(p) for p in model.parameters()], "full": full}

    if dist.get_rank() == 0:
        alone, opt = small_net(seed=1), None
        opt = LearnedOptimizer(alone.parameters(), make_rule(rule), **SETTINGS)
        resume(alone, opt, folder / "two", no_dist=True)
        x, y = small_batch()
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()
            opt.step()
        saved = {
            "model": get_model_state_dict(alone),
            "optimizer": get_optimizer_state_dict(alone, opt),
        }
        dcp.save(saved, checkpoint_id=folder / "one", no_dist=True)
    dist.barrier()

    model, opt = sharded(rule, mesh, seed=2)
    resume(model, opt, folder / "one")
    local_steps(model, opt, 3)
    result["resharded"] = [whole(p) for p in model.parameters()]

    model, opt = sharded(rule, mesh, seed=3)
    own = copy.deepcopy(full)  # these calls cut up what they are given
    set_model_state_dict(model, own["model"], options=FULL)
    set_optimizer_state_dict(model, opt, own["optimizer"], options=FULL)
    local_steps(model, opt, 6)
    result["from_full"] = [whole(p) for p in model.parameters()]
    return result


def resume(model: nn.Module, opt: LearnedOptimizer, folder: Path, **options: Any) -> None:
    """Load a distributed checkpoint into whatever sharding ``model`` has."""
    target = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt),
    }
    dcp.load(target, checkpoint_id=folder, **options)
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, opt, target["optimizer"])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    hybrid = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    scenarios: dict[str, tuple[Any, ...]] = {}
    for name, run, *more in (
        ("ddp", ddp),
        ("zero", zero),
        ("fsdp2", fsdp2, mesh),
        ("hybrid", fsdp2, hybrid),
        ("checkpoints", checkpoints, mesh),
    ):
        for rule in SCENARIO_RULES[name]:
            place = [folder / f"dcp-{rule}"] if name == "checkpoints" else []
            scenarios[f"{name}-{rule}"] = (run, rule, *more, *place)
    scenarios["bad-batch-normalized"] = (bad_batch, "normalized", mesh)
    scenarios["compiled-lstm-descending"] = (compiled, "lstm-descending", mesh)
    for name, (run, *arguments) in scenarios.items():
        result = run(*arguments)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
