"""Meta-training runs: resuming, schedules, divergence, several ranks."""

import errno
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import learned_optim
from learned_optim import CheckpointError, load_record, load_rule
from learned_optim.meta import (
    EvolutionRecipe,
    MetaTrainer,
    Recipe,
    load_recipe,
    recipes,
)
from learned_optim.meta.method import Validation
from learned_optim.meta.progress import TrainingError
from learned_optim.meta.recipes import AnyRecipe, recipe_from_json
from learned_optim.meta.unrolls import Unrolls
from learned_optim.meta.validation import ADAMW_LRS
from learned_optim.rules import RuleConfig
from learned_optim.rules._config import RULES
from learned_optim.rules.classical import SGDRule
from learned_optim.rules.equivariant import EquivariantConfig
from learned_optim.rules.horizon import HorizonConfig
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
    validation_runs=2,
    test_runs=8,
)


def bits(trainer: MetaTrainer) -> list[torch.Tensor]:
    return [*trainer.rule.state_dict().values(), *trainer.kept.state_dict().values()]


class Stopped(Exception):
    """Ends a training between two writes."""


def stop_at(trainer: MetaTrainer, done: int) -> None:
    """Train until so many runs, or meta-steps of evolution strategies, are done."""

    def report(text: str) -> None:
        if trainer.progress[0] == done:
            raise Stopped

    with pytest.raises(Stopped):
        trainer.train(report)


def test_resumed_run_equals_uninterrupted(tmp_path: Path) -> None:
    whole = MetaTrainer(SMALL, tmp_path / "whole")
    whole.train()
    stop_at(MetaTrainer(SMALL, tmp_path / "parts"), 2 * 3 + 2)  # in the middle of an epoch
    resumed = MetaTrainer(SMALL, tmp_path / "parts")
    assert resumed.round == 2
    resumed.train()
    for a, b in zip(bits(resumed), bits(whole), strict=True):
        assert torch.equal(a, b)
    figures = [
        [(m.meta_loss, m.validation, m.meta_lr) for m in t.history] for t in (whole, resumed)
    ]
    assert figures[0] == figures[1]
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    best = [load_rule(tmp_path / f / "best.safetensors").fingerprint() for f in ("whole", "parts")]
    assert best[0] == best[1]


EVOLVED = EvolutionRecipe(
    rule=HorizonConfig(hidden_size=3), task="quadratic", horizon=20, meta_steps=9, meta_lr=1e-2,
    meta_lr_final=1e-3, tasks_per_meta_step=3, pairs=2, validation_tasks=3, validation_every=3,
)  # fmt: skip
#: Of either method.
RECIPES = [
    replace(SMALL, epochs=4, runs_per_epoch=2, validation_horizon=4),
    EVOLVED,
]
BOTH = pytest.mark.parametrize("recipe", RECIPES, ids=["unrolls", "evolution"])


#: Where a training is killed: before or after the n-th time that a file is renamed into place, or
#: in the middle of the n-th meta-step.
KILLS = [
    ("after", "recipe.json", 1),
    ("before", "references.json", 2),
    ("after", "references.json", 2),
    ("inside", "meta-step", 7),
    ("before", "best.safetensors", 1),
    ("after", "best.safetensors", 1),
    ("before", "metrics.jsonl", 2),
    ("after", "metrics.jsonl", 3),
    ("before", "resume.pt", 2),
    ("after", "resume.pt", 2),
]


def die_at(when: str, what: str, count: int) -> None:
    """Arrange for this process to be killed at a stated point."""
    rename, step, seen = Path.replace, torch.optim.Adam.step, itertools.count(1)

    def reached(where: str) -> None:
        if where == when and next(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_rename(path: Path, target: Path) -> Path:
        if target.name == what:
            reached("before")
        renamed = rename(path, target)
        if target.name == what:
            reached("after")
        return renamed

    def dying_step(optimizer: torch.optim.Adam, *args: Any) -> Any:
        reached("inside")
        return step(optimizer, *args)

    Path.replace, torch.optim.Adam.step = dying_rename, dying_step  # type: ignore[method-assign]


@BOTH
@pytest.mark.parametrize("point", KILLS, ids=lambda point: "-".join(map(str, point)))
def test_a_kill_changes_nothing(
    recipe: AnyRecipe, point: tuple[str, str, int], tmp_path: Path, whole_runs: dict[str, Path]
) -> None:
    folder, whole = tmp_path / "run", whole_runs[type(recipe).__name__]
    child = os.fork()
    if not child:
        die_at(*point)
        MetaTrainer(recipe, folder).train()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    for checkpoint in folder.glob("*.safetensors"):
        load_rule(checkpoint)
    MetaTrainer(recipe, folder).train()
    states = [torch.load(path / "resume.pt", weights_only=True) for path in (folder, whole)]
    assert_same(*states)
    assert load_rule(folder).fingerprint() == load_rule(whole).fingerprint()
    assert (folder / "references.json").read_text() == (whole / "references.json").read_text()
    assert not list(folder.glob(".*.tmp"))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of uninterrupted trainings, by the kind of recipe."""
    folders = {}
    for recipe in RECIPES:
        folder = folders[type(recipe).__name__] = tmp_path_factory.mktemp("whole")
        MetaTrainer(recipe, folder).train()
    return folders


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, but for durations."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if "second" not in str(key):
                assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@BOTH
def test_resuming_under_another_version_is_refused(
    recipe: AnyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MetaTrainer(recipe, tmp_path)
    ours = learned_optim.__version__
    with monkeypatch.context() as patch:
        patch.setattr(learned_optim, "__version__", "9.9.9")
        with pytest.raises(ValueError, match=rf"learned_optim: {ours} then, 9\.9\.9 now"):
            MetaTrainer(recipe, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9+cpu")
        with pytest.raises(ValueError, match=r"torch: .* then, 9\.9\.9 now"):
            MetaTrainer(recipe, tmp_path)
    with pytest.raises(ValueError, match=r"another recipe .*\(seed: 0 there, 1 here\)"):
        MetaTrainer(replace(recipe, seed=1), tmp_path)
    MetaTrainer(recipe, tmp_path)


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
    assert record["epoch"] == trainer.best.round
    assert record["test"]["runs"] == 8
    assert record["recipe"] == recipe.to_json()
    assert recipe_from_json(record["recipe"]) == recipe
    # The best epoch's weights are kept, not the last one's.
    assert trainer.validate(load_rule(path)) == trainer.best.validation


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
    assert second.rule.fingerprint() != load_rule(checkpoint).fingerprint()
    record = load_record(second.finish(tmp_path / "second.safetensors"))
    assert record["start"] == load_rule(checkpoint).fingerprint()
    again = MetaTrainer(recipe, tmp_path / "second")  # resumes, and does not start over
    assert all(torch.equal(a, b) for a, b in zip(bits(again), bits(second), strict=True))


def test_start_must_be_of_the_same_rule(tmp_path: Path) -> None:
    checkpoint = MetaTrainer(replace(SMALL, epochs=1), tmp_path / "first")
    checkpoint.train()
    start = str(tmp_path / "first" / "best.safetensors")
    wider = replace(SMALL, start=start, rule=replace(SMALL.rule, hidden_size=5))
    with pytest.raises(ValueError, match=r"hidden_size=5.*hidden_size=4.*one kind and size"):
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
    MetaTrainer(SMALL, tmp_path, against_adamw=False).train()
    expected = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * k / 36)) for k in range(36)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([5.0, 4.0, 6.0, 7.0, 3.0])
    monkeypatch.setattr(Unrolls, "validate", lambda *_: Validation(next(figures)))
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
    assert longer.round == 1
    with pytest.raises(ValueError, match="different: epochs"):
        MetaTrainer(SMALL, tmp_path / "scheduled") and MetaTrainer(
            replace(SMALL, epochs=9), tmp_path / "scheduled"
        )


# ---- the run folder


def trained(folder: Path, **changes: Any) -> MetaTrainer:
    trainer = MetaTrainer(replace(SMALL, **{"epochs": 2, **changes}), folder)
    trainer.train()
    return trainer


def test_a_flipped_bit_of_the_resume_state_is_noticed(tmp_path: Path) -> None:
    expected = trained(tmp_path)
    file = tmp_path / "resume.pt"
    content = file.read_bytes()
    draws = torch.Generator().manual_seed(0)
    refused = 0
    for bit in torch.randint(8 * len(content), (60,), generator=draws).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        try:
            resumed = MetaTrainer(expected.recipe, tmp_path)
        except ValueError as error:
            assert str(error).startswith(f"{file} is damaged (")  # noqa: PT017
            refused += 1
            continue
        assert resumed.history == expected.history
        assert all(torch.equal(a, b) for a, b in zip(bits(resumed), bits(expected), strict=True))
    assert refused > 20


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[:-200],
        lambda whole: b"",
        lambda whole: b"\x80\x04K\x01.",
        lambda whole: saved({"optimizer": {}}),
        lambda whole: saved([1, 2]),
        lambda whole: saved({**torch.load(io.BytesIO(whole)), "history": [{"round": 1}]}),
        lambda whole: saved(
            {**torch.load(io.BytesIO(whole)), "optimizer": {"rule": {"w": torch.ones(2)}}}
        ),
    ],
)
def test_damaged_resume_state_says_what_to_delete(
    content: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    trainer = trained(tmp_path)
    file = tmp_path / "resume.pt"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=r"resume\.pt is damaged \(.*delete it.*begins again"):
        MetaTrainer(trainer.recipe, tmp_path)
    file.unlink()
    assert MetaTrainer(trainer.recipe, tmp_path).round == 0


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["recipe.json", "protocol.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_damaged_descriptions_say_what_to_delete(name: str, content: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*delete it"):
        MetaTrainer(trainer.recipe, tmp_path)
    (tmp_path / name).unlink()
    assert MetaTrainer(trainer.recipe, tmp_path).round == 2


def test_damaged_best_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"best\.safetensors .*delete the run folder"):
        trainer.finish()


def test_differing_recipes_show_both_values(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"horizon: 10 there, 20 here"):
        trained(tmp_path, horizon=20)


def test_one_training_in_a_folder(tmp_path: Path) -> None:
    """A second process is told so; afterwards it goes on from where the first stopped."""
    waiting = MetaTrainer(SMALL, tmp_path)
    command = [
        sys.executable, "-m", "learned_optim.cli", "train", str(tmp_path / "recipe.json"),
        "--folder", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent)}

    trainer = MetaTrainer(SMALL, tmp_path)
    asked = []

    def meanwhile(text: str) -> None:
        if trainer.progress[0] == 4 and not asked:
            asked.append(text)
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"another process is training in {tmp_path}" in done.stderr

    trainer.train(meanwhile)
    assert asked
    with pytest.raises(ValueError, match="another process went on with the run in"):
        waiting.train()
    assert MetaTrainer(SMALL, tmp_path).round == SMALL.epochs


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".resume.pt.abc123.tmp"
    leftover.write_bytes(b"half")
    MetaTrainer(SMALL, tmp_path)
    assert leftover.exists()  # somebody may be writing it
    trained(tmp_path, epochs=4)
    assert not list(tmp_path.glob(".*.tmp"))


def test_full_disk_keeps_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path, epochs=1, meta_lr_final=None)
    fsync = os.fsync

    def full(handle: int) -> None:
        fsync(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = replace(expected.recipe, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*recipe\.json: No space left"):
            MetaTrainer(recipe, tmp_path)
    trainer = MetaTrainer(recipe, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
            trainer.train()
    assert not list(tmp_path.glob(".*.tmp"))
    assert MetaTrainer(recipe, tmp_path).round == 1


TASKS_OF_MINE = """
from learned_optim.meta.tasks.quadratic import Quadratics
FAMILIES = {"small": lambda options: Quadratics(size=3)}
"""


def test_resuming_after_the_tasks_source_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_tasks.py"
    module.write_text(TASKS_OF_MINE)
    monkeypatch.syspath_prepend(tmp_path)
    trained(tmp_path / "run", task="changing_tasks:small")
    module.write_text(TASKS_OF_MINE.replace("size=3", "size=4"))
    with pytest.raises(
        ValueError, match=r"source of changing_tasks: \w+ then, \w+ now\): choose another folder"
    ):
        trained(tmp_path / "run", task="changing_tasks:small")
    module.write_text(TASKS_OF_MINE)
    trained(tmp_path / "run", task="changing_tasks:small")


def test_resuming_after_the_weights_of_start_changed_is_refused(tmp_path: Path) -> None:
    start = trained(tmp_path / "first").finish(tmp_path / "start.safetensors")
    trained(tmp_path / "second", start=str(start), seed=1)
    trained(tmp_path / "third", seed=2).finish(start)
    with pytest.raises(ValueError, match=r"weights of start: \w+ then, \w+ now"):
        trained(tmp_path / "second", start=str(start), seed=1)


# ---- training that teaches nothing


def test_nothing_but_dropped_unrolls_is_an_error(tmp_path: Path) -> None:
    """A task that explodes after its first steps, whatever the rule does."""
    trainer = MetaTrainer(SMALL, tmp_path)
    for weight in (*trainer.rule.parameters(), *trainer.kept.parameters()):
        weight.data.fill_(1e30)
    with pytest.raises(TrainingError, match=r"epoch 1 taught nothing: all of its 3 unrolls .*--me"):
        trainer.train()
    with pytest.raises(TrainingError, match=r"none of the 0 epochs .* finite validation"):
        trainer.finish()
    assert not list(tmp_path.glob("*.safetensors"))


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
"""
TRAIN = 'sys.exit(main(["train", sys.argv[1], "--folder", sys.argv[2]]))'
# torchrun's agent, with ranks that are forked: each would import torch for seconds.
FORK = """
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="ranks", rdzv_backend="c10d",
    rdzv_endpoint="localhost:0", start_method="fork",
)
elastic_launch(config, main)(["train", sys.argv[1], "--folder", sys.argv[2]])
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def on_two_ranks(
    recipe: Recipe, folder: Path, script: str = RANKS + TRAIN, launcher: Sequence[str] = TORCHRUN
) -> MetaTrainer:
    """A recipe trained under ``torchrun``, loaded from its folder."""
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (folder / "rank.py").write_text(script)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    launched = subprocess.run(
        [sys.executable, *launcher, str(folder / "rank.py"), str(folder / "recipe.json"),
         str(folder / "two")],
        env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    trainer = MetaTrainer(recipe, folder / "two")
    assert trainer.round == recipe.epochs
    return trainer


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Two ranks share the tasks of each meta-step; one rank does them all."""
    recipe = replace(SMALL, epochs=2, coordinates=None)
    two = on_two_ranks(recipe, tmp_path)
    one = MetaTrainer(recipe, tmp_path / "one")
    one.train()
    for a, b in zip(two.kept.parameters(), one.kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for figure in ("validation", "ratio_to_adamw"):
        found = [[getattr(m, figure) for m in t.history] for t in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


# Whatever travels between ranks is written to a file.
SIZES = """
import os
reduce, sizes = dist.all_reduce, []
def counting(tensor, *rest, **options):
    sizes.append(tensor.numel())
    with open(sys.argv[2] + os.environ["RANK"] + ".txt", "w") as file:
        print(*sizes, file=file)
    return reduce(tensor, *rest, **options)
dist.all_reduce = counting
"""


@pytest.mark.slow
def test_two_ranks_share_the_pairs_of_evolution_strategies(tmp_path: Path) -> None:
    """The same bits as of one rank, also of a number of pairs that is no multiple of the ranks."""
    recipe = replace(SMALL, epochs=2, estimator="pes", pairs=3, tasks_per_meta_step=1)
    two = on_two_ranks(recipe, tmp_path, RANKS + SIZES + FORK, launcher=())
    one = MetaTrainer(recipe, tmp_path / "one")
    one.train()
    assert all(torch.equal(a, b) for a, b in zip(bits(two), bits(one), strict=True))
    weights = sum(p.numel() for p in one.rule.parameters())
    for rank in (0, 1):
        sizes = [int(size) for size in (tmp_path / f"two{rank}.txt").read_text().split()]
        # Of each unroll of 4, 4 and 2 steps, its losses and the fitness of two runs per pair; of
        # AdamW at each rate, a sum per validation run; less for meeting and validating.
        assert max(sizes) == 4 + 2 * 3 < weights
        assert len([size for size in sizes if size > 1]) == 2 * 3 * 3 + len(ADAMW_LRS)


TOML = """
task = "digits-torch"
epochs = 3
meta_lr = 1e-2
horizon = 50
clip_norm = 1.0

[rule]
name = "equivariant"
config = { hidden_size = 16, direct = true }
"""


def test_recipes_in_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe == Recipe(
        task="digits-torch", rule=EquivariantConfig(hidden_size=16, direct=True), epochs=3,
        meta_lr=0.01, horizon=50, clip_norm=1.0,
    )  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(recipe.to_json()))
    assert load_recipe(str(tmp_path / "mine.json")) == recipe
    (tmp_path / "short.toml").write_text(TOML.partition("[rule]")[0] + "rule = 'lstm'\n")
    assert load_recipe(str(tmp_path / "short.toml")).rule == LSTMConfig()
    MetaTrainer(SMALL, tmp_path / "run")
    assert load_recipe(str(tmp_path / "run")) == SMALL
    (tmp_path / "run" / "recipe.json").write_text('{"task": "quad')
    message = r"recipe\.json: Unterminated string .* delete it, .* and --folder .*run: nothing else"
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs", "epoch", r"unknown field 'epoch'\. Did you mean 'epochs'\?"),
        ("meta_lr", "learning_rate", r"unknown field 'learning_rate'\. Fields: task, rule, epo"),
        ("hidden_size", "hidden_sizes", r"fields are .*Did you mean 'hidden_size'\?"),
        ("config", "configs", r"unknown field 'configs' of rule, .* Did you mean 'config'\?"),
        (
            '"equivariant"',
            '"equivarant"',
            r"unknown update rule .* Did you mean 'equivariant'\?",
        ),
        ('"equivariant"', '"nowhere:equivariant"', "no update rules from module 'nowhere'"),
        ("epochs = 3", "", "it lacks epochs"),
        ("epochs = 3", "epochs = '3'", "epochs must be int, got '3'"),
        ("epochs = 3", "epochs = ", "Invalid value"),
        ("{ hidden_size = 16, direct = true }", "3", "the config of a rule must be a table, got 3"),
    ],
)
def test_faults_of_a_recipe_file_are_named(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"mine\.toml: .*{message}"):
        load_recipe(str(path))


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
        (
            {"estimator": "guess"},
            "estimator must be one of 'replay', 'autograd', 'full', 'es', 'pes', g",
        ),
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
        assert data["rule"] == {
            "name": "test_trainer:with-a-tuple",
            "config": {"betas": [0.1, 0.2, 0.3]},
        }
        assert recipe_from_json(data) == recipe
        with pytest.raises(ValueError, match="does not fit update rule 'with-a-tuple'"):
            recipe_from_json({**data, "rule": {**data["rule"], "config": {"gammas": [1]}}})
        with pytest.raises(ValueError, match="not a recipe"):
            recipe_from_json({**data, "rule": {"name": "lstm", "config": [1]}})
    finally:
        del RULES["with-a-tuple"]
