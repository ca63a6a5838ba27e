"""Two gloo processes against one: DDP, ZeRO, FSDP2, distributed checkpoints, resharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import MATRICES, SCENARIO_RULES, flat, make_rule, small_net, train
from .distributed_worker import long_run, small_transformer
from .test_docs import SHARED, SNIPPETS, TORCHRUN

SETTINGS: dict[str, Any] = {"lr": 0.5, "weight_decay": 1.0}
# Two halves of a batch are summed in another order than the batch; Adam and its like divide small
# gradients by their size, so the last bits of those show in the update.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    # Stores that listen already: a port that is merely free now may be taken later.
    stores = {
        name: TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in TORCHRUN
    }
    snippets = {name: (store.port, SHARED + SNIPPETS[name]) for name, store in stores.items()}
    (folder / "snippets.json").write_text(json.dumps(snippets))
    run_ranks(folder, 2)
    return folder


def run_ranks(folder: Path, world: int) -> None:
    """``distributed_worker`` in ``world`` processes."""
    tests = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)]),
    }
    processes = []
    for rank in map(str, range(world)):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "compat.distributed_worker", str(folder)]
            ranked = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(
                subprocess.Popen(command, env=ranked, stdout=log, stderr=log, cwd=folder)
            )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)


def load(results: Path, name: str) -> Any:
    return torch.load(results / f"{name}.pt", weights_only=True)


def alone(rule: str, steps: int = 6) -> tuple[list[torch.Tensor], LearnedOptimizer]:
    """The same training in one process on the whole batch."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), make_rule(rule), **SETTINGS)
    train(model, opt, steps)
    return [p.detach() for p in model.parameters()], opt


SAME = ("ddp", "zero", "fsdp2", "hybrid", "compiled")


@pytest.mark.parametrize(
    ("way", "rule"), [(way, rule) for way in SAME for rule in SCENARIO_RULES[way]]
)
def test_two_processes_make_the_steps_of_one(results: Path, way: str, rule: str) -> None:
    found = load(results, f"{way}-{rule}")
    params, opt = alone(rule)
    assert (params[0] - small_net()[0].weight).abs().max() > 2e-4
    assert_close(found["params"], params, **CLOSE)
    own = [*opt.state_dict()["state"].values()]
    assert_close(found.get("state", own), own, **CLOSE)
    assert 0 < found.get("own", 1) < 4  # of ZeRO's four parameters a rank has a share


@pytest.mark.parametrize("rule", SCENARIO_RULES["fsdp2"])
def test_fsdp2_state_is_cut_like_its_parameter(results: Path, rule: str) -> None:
    for key, cut, whole, shard in load(results, f"fsdp2-{rule}")["layouts"]:
        own = make_rule(rule)
        square = key in own.matrix_state and key != "basis_age"
        assert cut == (square or key not in {"step", *own.tensor_state, *own.matrix_state})
        if cut:
            assert shard[0] == (whole[0] + 1) // 2  # 3 rows lie as 2 and 1
            assert shard[1:] == whole[1:]


@pytest.mark.parametrize("rule", SCENARIO_RULES["checkpoints"])
def test_checkpoints_reshard_and_full_state_dicts_go_anywhere(results: Path, rule: str) -> None:
    found = load(results, f"checkpoints-{rule}")
    params, _ = alone(rule, steps=9)
    for name in ("uninterrupted", "resharded"):  # from 2 processes to 1 to 2
        assert_close(found[name], params, **CLOSE)
    for name in ("from_full", "from_flat"):
        assert_close(found[name], found["uninterrupted"], rtol=0, atol=0)
    model, full = small_net(seed=5), found["full"]
    opt = LearnedOptimizer(model.parameters(), make_rule(rule), **SETTINGS)
    model.load_state_dict(full["model"])
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, opt, full["optimizer"], options=options)
    train(model, opt, 6)
    assert_close(flat(model), torch.cat([p.flatten() for p in params]), **CLOSE)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_matrices_take_the_steps_of_whole_ones(
    results: Path, tmp_path: Path, world: int
) -> None:
    """200 steps of a transformer, and what the optimizer says of the last one."""
    folder = results if world == 2 else tmp_path
    if world != 2:
        run_ranks(folder, world)
    found = load(folder, f"transformer-{MATRICES}")
    model = small_transformer()
    numbers = long_run(model)
    params = [p.detach() for p in model.parameters()]
    assert_close(found["params"], params, rtol=1e-5, atol=1e-5)
    assert len(found["numbers"]) < len(numbers)  # a matrix is reported by its owner
    own = {name: numbers[name] for name in found["numbers"]}
    assert_close(found["numbers"], own, rtol=1e-4, atol=1e-6)
    if world == 2:
        return
    placed = load(folder, f"placements-{MATRICES}")
    long_run(model := small_transformer(), 30)
    params = [p.detach() for p in model.parameters()]
    for name in ("columns", "replicas of columns"):
        assert_close(placed[name], params, rtol=1e-5, atol=1e-5)
    (message,) = placed["cut twice"]
    assert "(11, 12) has placements (Shard(dim=0), Shard(dim=1))" in message


def test_nan_on_one_rank_counts_as_zero_there(results: Path) -> None:
    found = load(results, "bad-batch-normalized")
    assert all(torch.isfinite(p).all() for p in found["params"])
    assert all(torch.isfinite(v).all() for state in found["state"] for v in state.values())
    assert [state["step"].item() for state in found["state"]] == [6.0] * 4


@pytest.mark.parametrize("name", TORCHRUN)
def test_snippets_of_the_documentation(results: Path, name: str) -> None:
    losses = load(results, name)
    assert len(losses) >= 30
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_reading_the_state_dict_of_a_fresh_optimizer_leaves_no_trace(rule: UpdateRule, lr) -> None:
    """get_optimizer_state_dict steps at lr = 0 to create state; training then goes as without."""
    results = []
    for look in (False, True):
        model = small_net()
        opt = LearnedOptimizer(model.parameters(), rule, lr=lr, weight_decay=0.1)
        if look:
            state = get_optimizer_state_dict(model, opt)["state"]
            assert set(state) == {"0.weight", "0.bias", "2.weight", "2.bias"}
            assert all(entries["step"].item() == 0.0 for entries in state.values())
        train(model, opt, 4)
        results.append(flat(model))
    assert torch.equal(*results)
