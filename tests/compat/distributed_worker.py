"""The processes of ``test_distributed.py``, run with a folder as their argument.

Rank 0 leaves a file ``<scenario>-<rule>.pt`` of whole tensors for every scenario. Four
processes run a long one, and other placements.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

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
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from learned_optim import LearnedOptimizer

from .common import MATRICES, SCENARIO_RULES, make_rule, small_batch, small_net, train

SETTINGS: dict[str, Any] = {"lr": 0.5, "weight_decay": 1.0}
FULL = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


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


def whole_params(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


def whole_state(opt: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """As saved: a matrix with an owner has its live state there alone."""
    saved = opt.state_dict()["state"]
    return [{key: whole(value) for key, value in saved[i].items()} for i in sorted(saved)]


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
    return {"params": whole_params(model), "state": whole_state(opt)}


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
        "params": whole_params(model),
        "state": [state[index] for index in sorted(state)],
        "own": own,
    }


def fsdp2(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    """State is cut like its parameter; whole tensors' state is not."""
    model, opt = sharded(rule, mesh)
    local_steps(model, opt, 6)
    saved = opt.state_dict()["state"]
    layouts = [
        (key, isinstance(value, DTensor) and value.placements == p.placements, *local_shapes(value))
        for index, p in enumerate(model.parameters())
        for key, value in saved[index].items()
    ]
    # Directions of a basis without a gradient are rounding, and the statistics with them.
    state = {} if rule == MATRICES else {"state": whole_state(opt)}
    return {"params": whole_params(model), "layouts": layouts, **state}


def small_transformer() -> nn.Module:
    """Two layers of width 12, an embedding and a readout; sides of 11 and 30 rows."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 30, dropout=0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(11, 12), body, nn.Linear(12, 11))


def long_run(model: nn.Module, steps: int = 200) -> dict[str, dict[str, float]]:
    """Steps of the default; diagnostics of the last one.

    Gradients are drawn, because training would magnify the last bits of every sum.
    """
    opt = LearnedOptimizer(model.parameters(), make_rule(MATRICES), total_steps=steps)
    means = [torch.randn(p.shape) for p in small_transformer().parameters()]
    for step in range(steps):
        for index, (p, mean) in enumerate(zip(model.parameters(), means, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + index)
            grad = mean + torch.randn(p.shape, generator=generator)
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if sharded else grad
        opt.diagnose(step == steps - 1)
        opt.step()
    return opt.diagnostics()


def transformer(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Parameters after a long run, and this rank's diagnostics."""
    model = small_transformer()
    for layer in (*model[1].layers, model):
        fully_shard(layer, mesh=mesh)
    numbers = long_run(model)
    return {"params": whole_params(model), "numbers": numbers}


def placements(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Parameters after 30 steps by placement, and warnings where two dimensions cut a matrix."""
    grid = init_device_mesh("cpu", (2, 2))
    found: dict[str, Any] = {}
    for name, own, matrices, others in (
        ("columns", mesh, [Shard(1)], [Replicate()]),
        ("replicas of columns", grid, [Replicate(), Shard(1)], [Replicate(), Shard(0)]),
        ("cut twice", grid, [Shard(0), Shard(1)], [Replicate(), Replicate()]),
    ):
        model = small_transformer()
        place_params(model, own, matrices, others)
        with warnings.catch_warnings(record=True) as caught:
            long_run(model, 30)
        found[name] = whole_params(model)
    return {**found, "cut twice": [str(warning.message) for warning in caught]}


def place_params(
    model: nn.Module, mesh: DeviceMesh, matrices: list[Placement], others: list[Placement]
) -> None:
    """Replace parameters by DTensors of these placements."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            places = matrices if p.dim() == 2 else others
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, places)))


def local_shapes(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    local = value.to_local() if isinstance(value, DTensor) else value
    return tuple(value.shape), tuple(local.shape)


def compiled(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    model, opt = sharded(rule, mesh, lr=torch.tensor(0.5))
    opt.step = torch.compile(opt.step, backend="aot_eager")  # type: ignore[method-assign]
    local_steps(model, opt, 6)
    return {"params": whole_params(model)}


def bad_batch(rule: str, mesh: DeviceMesh) -> dict[str, Any]:
    """One rank's gradient shard turns NaN once; both go on and agree."""
    model, opt = sharded(rule, mesh)
    local_steps(model, opt, 2)
    if dist.get_rank() == 1:
        for p in model.parameters():
            p.grad.to_local().fill_(float("nan"))
    opt.step()
    local_steps(model, opt, 3)
    return {"params": whole_params(model), "state": whole_state(opt)}


def checkpoints(rule: str, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Train on 2 ranks, go on on 1, go on on 2 again; and once more from the full state dict."""
    model, opt = sharded(rule, mesh)
    local_steps(model, opt, 3)
    dcp.save(states(model, opt), checkpoint_id=folder / "two")
    # Counters in a full state dict are the optimizer's own, as with torch.optim.
    full = copy.deepcopy(states(model, opt, options=FULL))
    flat = copy.deepcopy(states(model, opt, options=FLAT))
    local_steps(model, opt, 6)
    result = {"uninterrupted": whole_params(model), "full": full}

    if dist.get_rank() == 0:
        alone = small_net(seed=1)
        opt = LearnedOptimizer(alone.parameters(), make_rule(rule), **SETTINGS)
        resume(alone, opt, folder / "two", no_dist=True)
        train(alone, opt, 3)
        dcp.save(states(alone, opt), checkpoint_id=folder / "one", no_dist=True)
    dist.barrier()

    model, opt = sharded(rule, mesh, seed=2)
    resume(model, opt, folder / "one")
    local_steps(model, opt, 3)
    result["resharded"] = whole_params(model)

    # These calls cut up what they are given.
    for name, saved, options in (("full", copy.deepcopy(full), FULL), ("flat", flat, FLAT)):
        model, opt = sharded(rule, mesh, seed=3)
        set_model_state_dict(model, saved["model"], options=options)
        set_optimizer_state_dict(model, opt, saved["optimizer"], options=options)
        local_steps(model, opt, 6)
        result[f"from_{name}"] = whole_params(model)
    return result


def states(model: nn.Module, opt: LearnedOptimizer, **options: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, **options),
        "optimizer": get_optimizer_state_dict(model, opt, **options),
    }


def resume(model: nn.Module, opt: LearnedOptimizer, folder: Path, **options: Any) -> None:
    """Load a distributed checkpoint into whatever sharding ``model`` has."""
    target = states(model, opt)
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
    scenarios: list[tuple[Any, ...]] = [
        ("ddp", ddp),
        ("zero", zero),
        ("fsdp2", fsdp2, mesh),
        ("hybrid", fsdp2, hybrid),
        ("checkpoints", checkpoints, mesh),
        ("bad-batch", bad_batch, mesh),
        ("compiled", compiled, mesh),
        ("transformer", transformer, mesh),
    ]
    if world > 2:
        scenarios = [scenarios[-1], ("placements", placements, mesh)]
    for name, run, *more in scenarios:
        for rule in SCENARIO_RULES[name]:
            place = [folder / f"dcp-{rule}"] if name == "checkpoints" else []
            result = run(rule, *more, *place)
            if rank == 0:
                torch.save(result, folder / f"{name}-{rule}.pt")
    dist.destroy_process_group()
    # Snippets of the documentation, each with a store of its own, as torchrun would set it up.
    snippets = json.loads((folder / "snippets.json").read_text()) if world == 2 else {}
    for name, (port, code) in snippets.items():
        os.environ["MASTER_PORT"] = str(port)
        names: dict[str, Any] = {"__name__": "snippet"}
        exec(compile(code, name, "exec"), names)
        if rank == 0:
            torch.save(names["losses"], folder / f"{name}.pt")
    leave()


def leave() -> NoReturn:
    """End a process that did all its work, without tearing down the interpreter.

    Models, and caches of torch, keep process groups past ``destroy_process_group``. A thread of
    such a group that lets go of a tensor while the interpreter ends aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
