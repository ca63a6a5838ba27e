"""Meta-training runs: resuming, schedules, divergence, several ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import learned_optim
from learned_optim import load_record, load_rule
from learned_optim.meta import MetaTrainer, Recipe, load_recipe, recipes
from learned_optim.meta.recipes import recipe_from_json
from learned_optim.rules import RuleConfig
from learned_optim.rules._registry import _RULES
from learned_optim.rules.classical import SGDRule
from learned_optim.rules.lstm import LSTMConfig

SMALL = Recipe(
    task="quadratic",
    rule=LSTMConfig(preprocessing="raw", output_scale=1.0, hidden_size=4, num_layers=1),
    epochs=4,
    meta_lr=0.01,
    meta_lr_final=0.001,
    runs_per_epoch=3,
    tasks_per_meta_step=4,
    horizon=10,
    truncation=4,
    average=0.5,
    clip_norm=5.0,
    coordinates=30,
    validation_runs=8,
    test_runs=8,
)


def bits(trainer: MetaTrainer) -> list[torch.Tensor]:
    return [*trainer.rule.state_dict().values(), *trainer.kept.state_dict().values()]


def test_resumed_run_equals_uninterrupted(tmp_path: Path) -> None:
    whole = MetaTrainer(SMALL, tmp_path / "whole")
    whole.train()

    class Stopped(Exception):
        pass

    def stop(epoch: int, run: int, meta_loss: float) -> None:
        if (epoch, run) == (3, 1):  # in the middle of an epoch
            raise Stopped

    with pytest.raises(Stopped):
        MetaTrainer(SMALL, tmp_path / "parts").train(stop)
    resumed = MetaTrainer(SMALL, tmp_path / "parts")
    assert resumed.epoch == 2
    resumed.train()
    for a, b in zip(bits(resumed), bits(whole), strict=True):
        assert torch.equal(a, b)
    figures = [
        [(m.meta_loss, m.validation, m.meta_lr) for m in t.history] for t in (whole, resumed)
    ]
    assert figures[0] == figures[1]
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
    best = [load_rule(tmp_path / f / "best.safetensors").fingerprint() for f in ("whole", "parts")]
    assert best[0] == best[1]


def test_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL at a random moment: every file is whole, and the run goes on to the same end."""
    command = [
        sys.executable, "-m", "learned_optim.cli", "train", str(tmp_path / "recipe.json"),
        "--folder", str(tmp_path / "run"),
    ]  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(SMALL.to_json()))
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "resume.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (tmp_path / "run").glob("*.safetensors"):
        load_rule(path)
    subprocess.run(command, env=env, check=True, capture_output=True)
    whole = MetaTrainer(SMALL, tmp_path / "whole")
    whole.train()
    resumed = MetaTrainer(SMALL, tmp_path / "run")
    assert resumed.epoch == SMALL.epochs
    assert all(torch.equal(a, b) for a, b in zip(bits(resumed), bits(whole), strict=True))


def test_training_lowers_the_meta_loss(tmp_path: Path) -> None:
    recipe = replace(SMALL, epochs=6, runs_per_epoch=20, coordinates=None)
    trainer = MetaTrainer(recipe, tmp_path)
    before = trainer.validate()
    trainer.train()
    assert trainer.best is not None
    assert trainer.best.validation < 0.8 * before
    path = trainer.finish()
    record = load_record(path)
    assert record["validation"] == trainer.best.validation
    assert record["epoch"] == trainer.best.epoch
    assert record["test"]["runs"] == 8
    assert record["recipe"] == recipe.to_json()
    assert recipe_from_json(record["recipe"]) == recipe
    # The best epoch's weights are kept, not the last one's.
    trainer.kept.load_state_dict(load_rule(path).state_dict())
    assert trainer.validate() == trainer.best.validation


def test_one_bad_run_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from learned_optim.meta import estimators

    replay, calls = estimators.replay, []

    def sometimes_infinite(*args: object) -> object:
        result = replay(*args)
        calls.append(1)
        if len(calls) == 2:
            result.grads[0][:] = torch.inf
        return result

    monkeypatch.setitem(estimators.ESTIMATORS, "replay", sometimes_infinite)
    trainer = MetaTrainer(replace(SMALL, epochs=1), tmp_path)
    trainer.train()
    assert trainer.history[0].dropped == 1
    assert torch.isfinite(torch.tensor(trainer.history[0].meta_loss))
    # The first run of three unrolls ended with its second: 1 + 3 + 3 meta-steps.
    assert trainer.meta_steps == 7
    assert all(torch.isfinite(b).all() for b in bits(trainer))


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    first = MetaTrainer(SMALL, tmp_path / "first")
    first.train()
    checkpoint = first.finish(tmp_path / "first.safetensors")
    recipe = replace(SMALL, start=str(checkpoint), epochs=1, seed=1)
    second = MetaTrainer(recipe, tmp_path / "second")
    for rule in (second.rule, second.kept):
        assert rule.fingerprint() == load_rule(checkpoint).fingerprint()
    second.train()
    assert second.rule.fingerprint() != second._start == load_rule(checkpoint).fingerprint()
    record = load_record(second.finish(tmp_path / "second.safetensors"))
    assert record["start"] == load_rule(checkpoint).fingerprint()
    again = MetaTrainer(recipe, tmp_path / "second")  # resumes, and does not start over
    assert all(torch.equal(a, b) for a, b in zip(bits(again), bits(second), strict=True))


def test_finished_weights_share_in_the_first(tmp_path: Path) -> None:
    first = MetaTrainer(SMALL, tmp_path / "first")
    first.train()
    start = first.finish(tmp_path / "first.safetensors")
    recipe = replace(SMALL, start=str(start), epochs=2, seed=1, meta_lr=0.05)
    whole = MetaTrainer(recipe, tmp_path / "second")
    whole.train()
    best = load_rule(whole.finish(tmp_path / "whole.safetensors")).state_dict()
    shared = MetaTrainer(replace(recipe, start_share=0.25), tmp_path / "second")  # of the same run
    path = shared.finish(tmp_path / "shared.safetensors")
    begun = load_rule(start).state_dict()
    for name, weight in load_rule(path).state_dict().items():
        assert not best[name].equal(begun[name])
        torch.testing.assert_close(weight, 0.75 * best[name] + 0.25 * begun[name])
    record = load_record(path)
    assert record["recipe"]["start_share"] == 0.25
    assert record["validation"] == shared.validate(load_rule(path)) != whole.best.validation
    assert all(torch.equal(a, b) for a, b in zip(bits(shared), bits(whole), strict=True))


def test_start_must_be_of_the_same_rule(tmp_path: Path) -> None:
    checkpoint = MetaTrainer(replace(SMALL, epochs=1), tmp_path / "first")
    checkpoint.train()
    start = str(tmp_path / "first" / "best.safetensors")
    wider = replace(SMALL, start=start, rule=replace(SMALL.rule, hidden_size=5))
    with pytest.raises(ValueError, match=r"hidden_size=5.*hidden_size=4.*no place for lstm"):
        MetaTrainer(wider, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_schedule_and_average(tmp_path: Path) -> None:
    trainer = MetaTrainer(replace(SMALL, average=0.0), tmp_path / "a")
    trainer.train()
    assert trainer.meta_steps == 4 * 3 * 3
    assert trainer.history[-1].meta_lr < trainer.history[0].meta_lr < SMALL.meta_lr
    for kept, weight in zip(trainer.kept.parameters(), trainer.rule.parameters(), strict=True):
        assert torch.equal(kept, weight)
    constant = MetaTrainer(replace(SMALL, meta_lr_final=None, epochs=1), tmp_path / "b")
    constant.train()
    assert constant.history[0].meta_lr == SMALL.meta_lr


def test_cosine_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four epochs of three runs of three unrolls: 36 meta-steps from 0.01 towards 0.001."""
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1],
    )
    MetaTrainer(SMALL, tmp_path).train()
    expected = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * k / 36)) for k in range(36)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([5.0, 4.0, 6.0, 7.0, 3.0])
    monkeypatch.setattr(MetaTrainer, "validate", lambda self: next(figures))
    trainer = MetaTrainer(replace(SMALL, epochs=5, patience=2), tmp_path)
    trainer.train()
    assert [m.validation for m in trainer.history] == [5.0, 4.0, 6.0, 7.0]


def test_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    MetaTrainer(SMALL, tmp_path)
    with pytest.raises(ValueError, match=r"another recipe \(different: meta_lr, seed\)"):
        MetaTrainer(replace(SMALL, meta_lr=0.5, seed=1), tmp_path)


def test_longer_training_continues_without_a_schedule(tmp_path: Path) -> None:
    short = replace(SMALL, meta_lr_final=None, epochs=1)
    MetaTrainer(short, tmp_path).train()
    longer = MetaTrainer(replace(short, epochs=2), tmp_path)
    assert longer.epoch == 1
    with pytest.raises(ValueError, match="different: epochs"):
        MetaTrainer(SMALL, tmp_path / "scheduled") and MetaTrainer(
            replace(SMALL, epochs=9), tmp_path / "scheduled"
        )


# Whoever keeps the group keeps its threads, and those can abort the process at its end.
RANKS = """
import sys, weakref, torch.distributed as dist
from learned_optim.cli import main
destroy = dist.destroy_process_group
def destroy_for_good():
    group = weakref.ref(dist.group.WORLD)
    destroy()
    assert group() is None
dist.destroy_process_group = destroy_for_good
sys.exit(main(["train", sys.argv[1], "--folder", sys.argv[2]]))
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Two ranks share the tasks of each meta-step; one rank does them all."""
    recipe = replace(SMALL, epochs=2, coordinates=None)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (tmp_path / "rank.py").write_text(RANKS)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tmp_path / "rank.py"), str(tmp_path / "recipe.json"), str(tmp_path / "two")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    one = MetaTrainer(recipe, tmp_path / "one")
    one.train()
    two = MetaTrainer(recipe, tmp_path / "two")
    assert two.epoch == 2
    for a, b in zip(two.kept.parameters(), one.kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    validations = [[m.validation for m in t.history] for t in (one, two)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-4)


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_data(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_bad_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'nonesuch'; known: .*mnist"):
        load_recipe("nonesuch")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        replace(SMALL, epochs=0)
    with pytest.raises(ValueError, match="meta_lr must be positive, got -1"):
        replace(SMALL, meta_lr=-1)
    with pytest.raises(ValueError, match=r"not a recipe: .*momentum"):
        recipe_from_json({**SMALL.to_json(), "momentum": 0.9})
    with pytest.raises(ValueError, match="for evaluation only"):
        MetaTrainer(replace(SMALL, task="fashion"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no recipe file at .*gone\.json"):
        load_recipe(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_runs": 1}, "test_runs must be at least 2, got 1"),
        ({"validation_runs": 0}, "validation_runs must be at least 2, got 0"),
        ({"coordinates": 0}, "coordinates must be at least 1, got 0"),
        ({"unrolls_per_run": 0}, "unrolls_per_run must be at least 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"meta_lr": float("nan")}, "meta_lr must be positive, got nan"),
        ({"long_fraction": 1.5}, r"long_fraction must lie in \[0, 1\], got 1.5"),
        ({"estimator": "guess"}, "estimator must be one of 'replay', 'autograd', 'full', got 'g"),
        ({"validation_mean": "median"}, "validation_mean must be one of 'arithmetic', 'geometric'"),
        ({"epochs": "ten"}, "epochs must be int, got 'ten'"),
        ({"patience": 1.5}, r"patience must be int \| None, got 1.5"),
        ({"seed": True}, "seed must be int, got True"),
        ({"rule": LSTMConfig(output_scale="big")}, "output_scale must be float, got 'big'"),
        ({"rule": {}}, r"rule must be RuleConfig, got \{\}"),
    ],
)
def test_recipe_fields_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_lists_in_a_recipe_file_are_tuples_of_the_rule() -> None:
    @dataclass(frozen=True)
    class TupleConfig(RuleConfig):
        betas: tuple[float, ...] = (0.5, 0.75)

    class TupleRule(SGDRule):
        name = "with-a-tuple"
        Config = TupleConfig

    try:
        recipe = replace(SMALL, rule=TupleConfig((0.1, 0.2, 0.3)))
        data = json.loads(json.dumps(recipe.to_json()))
        assert data["rule"] == {"name": "with-a-tuple", "config": {"betas": [0.1, 0.2, 0.3]}}
        assert recipe_from_json(data) == recipe
        with pytest.raises(ValueError, match="does not fit update rule 'with-a-tuple'"):
            recipe_from_json({**data, "rule": {**data["rule"], "config": {"gammas": [1]}}})
        with pytest.raises(ValueError, match="not a recipe"):
            recipe_from_json({**data, "rule": {"name": "lstm", "config": [1]}})
    finally:
        del _RULES["with-a-tuple"]
