"""Two gloo processes against one: DDP, ZeRO, FSDP2, distributed checkpoints, resharding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import SCENARIO_RULES, flat, make_rule, small_net, train

SETTINGS: dict[str, Any] = {"lr": 0.5, "weight_decay": 1.0}
SOME, ALL = SCENARIO_RULES["ddp"], SCENARIO_RULES["fsdp2"]
# Two halves of a batch are summed in another order than the batch; Adam and its like divide small
# gradients by their size, so the last bits of those show in the update.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of what two processes left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    launch(folder)
    return folder


def launch(folder: Path) -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-m", "compat.distributed_worker", str(folder)]
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)]),
    }
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                )
            )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    (folder / "failed").write_text(
        "" if codes == [0, 0] else "\n".join(p.read_text() for p in logs)
    )


def load(results: Path, name: str) -> dict[str, Any]:
    failed = (results / "failed").read_text()
    file = results / f"{name}.pt"
    assert file.exists(), f"{name} did not finish:\n{failed[-4000:]}"
    return torch.load(file, weights_only=True)


def alone(rule: str, steps: int = 6) -> tuple[list[torch.Tensor], LearnedOptimizer]:
    """The same training in one process on the whole batch."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), make_rule(rule), **SETTINGS)
    train(model, opt, steps)
    return [p.detach() for p in model.parameters()], opt


def test_both_processes_ended_well(results: Path) -> None:
    assert (results / "failed").read_text() == ""


@pytest.mark.parametrize(
    ("way", "rule"),
    [(way, rule) for way in ("ddp", "zero", "fsdp2", "hybrid") for rule in SCENARIO_RULES[way]],
)
def test_two_processes_equal_one(results: Path, way: str, rule: str) -> None:
    """Parameters and state after six steps."""
    found = load(results, f"{way}-{rule}")
    params, opt = alone(rule)
    moved = flat(small_net()) - torch.cat([p.flatten() for p in params])
    assert moved.abs().max() > 1e-3
    for a, b in zip(found["params"], params, strict=True):
        assert_close(a, b, **CLOSE)
    # ZeRO shows what it would save; the others show the live state.
    own = opt.state_dict()["state"] if way == "zero" else opt.state
    for a, b in zip(found["state"], own.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], **CLOSE)


@pytest.mark.parametrize("rule", SOME)
def test_zero_spreads_the_state(results: Path, rule: str) -> None:
    assert 0 < load(results, f"zero-{rule}")["own"] < 4


@pytest.mark.parametrize("rule", ALL)
def test_fsdp2_state_is_cut_like_its_parameter(results: Path, rule: str) -> None:
    """Per-coordinate state is a DTensor with its parameter's placements, others are plain."""
    rule_state = set()
    for key, shape, local, cut, same, whole, shard in load(results, f"fsdp2-{rule}")["layouts"]:
        per_coordinate = key != "step" and key not in make_rule(rule).tensor_state
        assert cut == same == per_coordinate
        if per_coordinate:
            rule_state.add(key)
            assert whole[:-1] == shape
            assert shard[:-1] == local
            assert local[0] == (shape[0] + 1) // 2  # 3 rows lie as 2 and 1
        else:
            assert len(whole) == 0 or whole[0] == shape[0]
    fresh = make_rule(rule).init_state(torch.zeros(8, 5))
    assert rule_state == {key for key, value in fresh.items() if value.dim() == 3}
    assert rule_state


@pytest.mark.parametrize("rule", ALL)
def test_checkpoints_reshard_from_2_to_1_to_2(results: Path, rule: str) -> None:
    found = load(results, f"checkpoints-{rule}")
    params, _ = alone(rule, steps=9)
    for a, b, c in zip(found["uninterrupted"], found["resharded"], params, strict=True):
        assert_close(a, c, **CLOSE)
        assert_close(b, a, **CLOSE)


@pytest.mark.parametrize("rule", ALL)
def test_full_state_dicts_go_back_to_shards_exactly(results: Path, rule: str) -> None:
    found = load(results, f"checkpoints-{rule}")
    for a, b in zip(found["uninterrupted"], found["from_full"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ALL)
def test_a_full_state_dict_of_shards_loads_into_one_process(results: Path, rule: str) -> None:
    full = load(results, f"checkpoints-{rule}")["full"]
    model = small_net(seed=5)
    opt = LearnedOptimizer(model.parameters(), make_rule(rule), **SETTINGS)
    model.load_state_dict(full["model"])
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, opt, full["optimizer"], options=options)
    train(model, opt, 6)
    params, _ = alone(rule, steps=9)
    assert_close(flat(model), torch.cat([p.flatten() for p in params]), **CLOSE)


def test_nan_on_one_rank_counts_as_zero_there(results: Path) -> None:
    found = load(results, "bad-batch-normalized")
    assert all(torch.isfinite(p).all() for p in found["params"])
    assert all(torch.isfinite(v).all() for state in found["state"] for v in state.values())
    assert [state["step"].item() for state in found["state"]] == [6.0] * 4


def test_a_compiled_step_on_shards_gives_the_same_numbers(results: Path) -> None:
    found = load(results, "compiled-lstm-descending")
    params, _ = alone("lstm-descending")
    for a, b in zip(found["params"], params, strict=True):
        assert_close(a, b, **CLOSE)


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
