"""Meta-training runs: resuming, schedules, divergence, several ranks."""

import errno
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compat.common import flat
from conftest import SOURCE, python
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_structure

import learned_optim
from learned_optim import CheckpointError, load_record, load_rule
from learned_optim.meta import EvolutionRecipe, MetaTrainer, Recipe, estimators
from learned_optim.meta.method import TrainingError, Validation
from learned_optim.meta.recipes import AnyRecipe, recipe_from_json
from learned_optim.meta.unrolls import Unrolls
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


def trained(folder: Path, **changes: Any) -> MetaTrainer:
    trainer = MetaTrainer(replace(SMALL, **{"epochs": 2, **changes}), folder)
    trainer.train()
    return trainer


def bits(trainer: MetaTrainer) -> list[torch.Tensor]:
    return [*trainer.rule.state_dict().values(), *trainer.ema_rule.state_dict().values()]


# ---- resuming

#: Of either method.
RECIPES = [
    replace(SMALL, runs_per_epoch=2, validation_horizon=4),
    EvolutionRecipe(
        rule=HorizonConfig(hidden_size=3), task="quadratic", horizon=10, meta_steps=6,
        meta_lr=1e-2, meta_lr_final=1e-3, tasks_per_meta_step=2, pairs=1, validation_tasks=2,
        validation_every=3,
    ),
]  # fmt: skip

#: Where a training is killed: before or after the n-th time that a file is renamed into place, or
#: in the middle of the n-th meta-step.
KILLS = [
    ("after", "recipe.json", 1),
    ("before", "references.json", 2),
    ("after", "references.json", 2),
    ("inside", "meta-step", 5),
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


def dying_training(recipe: AnyRecipe, folder: Path, point: tuple[str, str, int]) -> None:
    """What the killed process does."""
    die_at(*point)
    MetaTrainer(recipe, folder).train()


@pytest.mark.parametrize(
    ("point", "recipe"),
    [*itertools.product(KILLS, RECIPES[:1]), *itertools.product(KILLS[2::3], RECIPES[1:])],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value.task,
)
def test_a_kill_changes_nothing(
    recipe: AnyRecipe, point: tuple[str, str, int], tmp_path: Path, whole_runs: dict[str, Path]
) -> None:
    folder, whole = tmp_path / "run", whole_runs[type(recipe).__name__]
    # Not forked from this process, in which other tests may have left threads with locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learned_optim.meta", "torch"])
    child = context.Process(target=dying_training, args=(recipe, folder, point))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
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
    assert tree_structure(one) == tree_structure(other)
    leaves = map(tree_leaves_with_path, (one, other))
    for (path, value), (place, wanted) in zip(*leaves, strict=True):
        assert path == place
        if "second" not in keystr(path):
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, wanted), path


def test_resuming_under_other_conditions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            MetaTrainer(replace(SMALL, **changes), tmp_path)

    MetaTrainer(SMALL, tmp_path)
    refused(
        r"another recipe \(horizon: 10 there, 20 here; seed: 0 there, 1 here\)",
        horizon=20, seed=1,
    )  # fmt: skip
    refused("epochs: 4 there, 9 here", epochs=9)  # on which the schedule depends
    ours = learned_optim.__version__
    with monkeypatch.context() as patch:
        patch.setattr(learned_optim, "__version__", "9.9.9")
        refused(rf"learned_optim: {ours} then, 9\.9\.9 now")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9+cpu")
        refused(r"torch: .* then, 9\.9\.9 now")
    MetaTrainer(SMALL, tmp_path)


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
    MetaTrainer(replace(SMALL, task="changing_tasks:small"), tmp_path / "run")
    module.write_text(TASKS_OF_MINE.replace("size=3", "size=4"))
    with pytest.raises(
        ValueError, match=r"source of changing_tasks: \w+ then, \w+ now\): choose another folder"
    ):
        MetaTrainer(replace(SMALL, task="changing_tasks:small"), tmp_path / "run")


# ---- training


def test_training_lowers_the_meta_loss(tmp_path: Path) -> None:
    recipe = replace(SMALL, epochs=4, runs_per_epoch=20, coordinates=None)
    trainer = MetaTrainer(recipe, tmp_path)
    before = trainer.validate()
    path = trainer.run()
    assert trainer.best.validation < 0.8 * before
    record = load_record(path)
    assert record["validation"] == trainer.best.validation
    assert record["epoch"] == trainer.best.round
    assert record["test"]["runs"] == 8
    assert recipe_from_json(record["recipe"]) == recipe
    # The best epoch's weights are kept, not the last one's.
    assert trainer.validate(load_rule(path)) == trainer.best.validation


def test_one_bad_run_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def sometimes_infinite(*args: Any) -> Any:
        result = estimators.replay(*args)
        calls.append(1)
        if len(calls) == 2:
            result.grads[0][:] = torch.inf
        return result

    monkeypatch.setitem(estimators.ESTIMATORS, "replay", sometimes_infinite)
    trainer = trained(tmp_path, epochs=1)
    assert trainer.history[0].dropped == 1
    assert math.isfinite(trainer.history[0].meta_loss)
    # The first run of three unrolls ended with its second: 1 + 3 + 3 meta-steps.
    assert trainer.meta_steps == 7
    assert all(torch.isfinite(b).all() for b in bits(trainer))


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    trained(tmp_path / "first").finish(start)
    fingerprint = load_rule(start).fingerprint()
    recipe = replace(SMALL, start=str(start), epochs=1, seed=1)
    second = MetaTrainer(recipe, tmp_path / "second")
    assert [rule.fingerprint() for rule in (second.rule, second.ema_rule)] == [fingerprint] * 2
    record = load_record(second.run())
    assert second.rule.fingerprint() != fingerprint
    assert record["start"] == fingerprint
    with pytest.raises(ValueError, match=r"hidden_size=5.*hidden_size=4.*one kind and size"):
        MetaTrainer(replace(recipe, rule=replace(SMALL.rule, hidden_size=5)), tmp_path / "third")
    assert not (tmp_path / "third").exists()
    trained(tmp_path / "other", seed=2).finish(start)
    with pytest.raises(ValueError, match=r"weights of start: \w+ then, \w+ now"):
        MetaTrainer(recipe, tmp_path / "second")


def test_schedule(tmp_path: Path) -> None:
    """Two epochs of three runs of three unrolls: 18 meta-steps from 0.01 towards 0.001."""
    found = [line.meta_lr for line in trained(tmp_path / "cosine").history]
    expected = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * k / 18)) for k in (8, 17)]
    assert found == pytest.approx(expected, rel=1e-12)
    constant = trained(tmp_path / "constant", meta_lr_final=None, epochs=1)
    assert constant.history[0].meta_lr == SMALL.meta_lr


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([5.0, 4.0, 6.0, 7.0, 3.0])
    monkeypatch.setattr(Unrolls, "validate", lambda *_: Validation(next(figures)))
    trainer = trained(tmp_path, epochs=5, patience=2)
    assert [m.validation for m in trainer.history] == [5.0, 4.0, 6.0, 7.0]


def test_nothing_but_dropped_unrolls_is_an_error(tmp_path: Path) -> None:
    """A task that explodes after its first steps, whatever the rule does."""
    trainer = MetaTrainer(SMALL, tmp_path)
    for weight in (*trainer.rule.parameters(), *trainer.ema_rule.parameters()):
        weight.data.fill_(1e30)
    with pytest.raises(TrainingError, match=r"epoch 1 taught nothing: all of its 3 unrolls .*--me"):
        trainer.train()
    with pytest.raises(TrainingError, match=r"none of the 0 epochs .* finite validation"):
        trainer.finish()
    assert not list(tmp_path.glob("*.safetensors"))


# ---- the run folder


@pytest.fixture
def folder(tmp_path: Path, whole_runs: dict[str, Path]) -> Path:
    """A finished training of the first recipe."""
    return Path(shutil.copytree(whole_runs["Recipe"], tmp_path / "run"))


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: whole[:-200],
        lambda whole: b"",
        lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        lambda whole: saved({"optimizer": {}}),
        lambda whole: saved([1, 2]),
        lambda whole: saved({**torch.load(io.BytesIO(whole)), "history": [{"round": 1}]}),
        lambda whole: saved(
            {**torch.load(io.BytesIO(whole)), "optimizer": {"rule": {"w": torch.ones(2)}}}
        ),
    ],
)
def test_damaged_resume_state_says_what_to_delete(
    content: Callable[[bytes], bytes], folder: Path
) -> None:
    file = folder / "resume.pt"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=r"resume\.pt is damaged \(.*delete it.*begins again"):
        MetaTrainer(RECIPES[0], folder)
    file.unlink()
    assert MetaTrainer(RECIPES[0], folder).round == 0


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["recipe.json", "protocol.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_descriptions_say_what_to_delete(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.* damaged.*delete it"):
        MetaTrainer(RECIPES[0], folder)
    (folder / name).unlink()
    assert MetaTrainer(RECIPES[0], folder).round == 4


def test_damaged_best_checkpoint_is_named(folder: Path) -> None:
    (folder / "best.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"best\.safetensors .*delete the run folder"):
        MetaTrainer(RECIPES[0], folder).finish()


def test_one_training_in_a_folder(tmp_path: Path) -> None:
    """A second one is refused; afterwards it goes on from where the first stopped."""
    waiting, trainer, asked = MetaTrainer(SMALL, tmp_path), MetaTrainer(SMALL, tmp_path), []

    def meanwhile(text: str) -> None:
        if trainer.progress[0] == 4 and not asked:
            asked.append(text)
            with pytest.raises(ValueError, match=f"another process is training in {tmp_path}"):
                MetaTrainer(SMALL, tmp_path).train()

    trainer.train(meanwhile)
    assert asked
    waiting.train(lambda _: pytest.fail("nothing is left to do"))
    assert waiting.round == SMALL.epochs
    assert all(map(torch.equal, bits(waiting), bits(trainer)))


def test_full_disk_keeps_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(trained(tmp_path, epochs=1, meta_lr_final=None).recipe, epochs=3)
    trainer, fsync = MetaTrainer(recipe, tmp_path), os.fsync

    def full(handle: int) -> None:
        fsync(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
            trainer.train()
    assert not list(tmp_path.glob(".*.tmp"))
    assert MetaTrainer(recipe, tmp_path).round == 1


# ---- several ranks

# torchrun's agent, with ranks that are forked: each would import torch for seconds. Rank 1 kills
# itself in the middle of the second epoch of the first attempt. A process group that outlives the
# training keeps its threads, which can abort the process at its end.
LAUNCH = """
import os, signal, sys, weakref
from pathlib import Path
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from learned_optim.cli import main
from learned_optim.meta.unrolls import Unrolls

train_run, destroy, died = Unrolls.train_run, dist.destroy_process_group, Path("died")

def dying(self, optimizer, epoch, run):
    if self.rank == 1 and (epoch, run) == (2, 1) and not died.exists():
        died.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return train_run(self, optimizer, epoch, run)

def destroy_for_good():
    group = weakref.ref(dist.group.WORLD)
    destroy()
    assert group() is None

Unrolls.train_run, dist.destroy_process_group = dying, destroy_for_good
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="ranks", rdzv_backend="c10d",
    rdzv_endpoint="localhost:0", max_restarts=1, start_method="fork",
)
statuses = elastic_launch(config, main)(["train", "recipe.json", "--folder", "two"])
sys.exit(0 if statuses == {0: 0, 1: 0} else str(statuses))
"""


@pytest.mark.slow
def test_two_ranks_equal_one_although_one_died(tmp_path: Path) -> None:
    """They share the tasks of each meta-step, and go on from the last epoch."""
    recipe = replace(SMALL, epochs=3, coordinates=None)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (tmp_path / "launch.py").write_text(LAUNCH)
    python("launch.py", folder=tmp_path, timeout=300, **SOURCE)
    assert (tmp_path / "died").exists()
    one, two = MetaTrainer(recipe, tmp_path / "one"), MetaTrainer(recipe, tmp_path / "two")
    one.train()
    assert two.round == recipe.epochs
    torch.testing.assert_close(flat(two.ema_rule), flat(one.ema_rule), rtol=1e-4, atol=1e-6)
    for figure in ("validation", "ratio_to_adamw"):
        found = [[getattr(m, figure) for m in t.history] for t in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
