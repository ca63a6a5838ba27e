"""Tasks and recipes for other data than that trained on: splits, labels, and no leaks."""

from pathlib import Path

import pytest
import torch
from test_trainer import SMALL

from learned_optim import load_record, save_rule
from learned_optim.cli import main
from learned_optim.evaluation.protocol import check_blind
from learned_optim.meta import MetaTrainer, TaskOptions, build_tasks
from learned_optim.meta.data import Images, halves
from learned_optim.meta.recipes import Recipe, load_recipe, recipe_from_json
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import TaskMixture, _examples, images
from learned_optim.meta.validation import summed_losses
from learned_optim.rules.classical import SGDRule

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("mnist", "fashion", "emnist-letters", "cifar10")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Images]:
    """Small sets under the real ones' names; every pixel of an image is its number in the set."""
    found = {}
    for index, name in enumerate(NAMES):
        count = 40 + 10 * index  # tells the sets apart by their batches' shapes, too
        pixels = (
            torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2 + index, 2)
        )
        found[name] = Images(pixels, torch.arange(count) % 10, 10)
    monkeypatch.setattr(images, "load_images", lambda name, train, options: found[name])
    monkeypatch.setattr(_examples, "load_images", lambda name, train, options: found[name])
    return found


def drawn(name: str, split: str, draws: int = 20) -> dict[int, set[int]]:
    """Numbers of the images in batches of a family's tasks, by the images' height."""
    family = build_tasks(name, TaskOptions(split))  # type: ignore[arg-type]
    seen: dict[int, set[int]] = {}
    for index in range(draws):
        generator = seeded("drawn", index)
        x, _ = family.sample(generator).batch(generator)
        numbers = {round(255 * value) for value in x[:, 0, 0, 0].tolist()}
        seen.setdefault(x.shape[2], set()).update(numbers)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_the_halves(name: str, made_up: dict[str, Images]) -> None:
    """Of MNIST always; of other sets where the name asks for it, and elsewhere all images."""
    halved = "mnist" if name == "mnist" else f"{name}-half"
    (meta,) = drawn(halved, "meta").values()
    (evaluation,) = drawn(halved, "evaluation").values()
    assert meta == {int(i) for i in halves(made_up[name])[0].pixels[:, 0, 0, 0]}
    assert meta | evaluation == set(range(len(made_up[name])))
    assert not meta & evaluation
    if halved != name:
        assert set().union(*drawn(name, "evaluation").values()) == meta | evaluation


@pytest.mark.parametrize("left_out", NAMES)
def test_the_set_left_out_is_never_drawn(left_out: str, made_up: dict[str, Images]) -> None:
    heights = {name: made_up[name].shape[1] for name in NAMES}
    seen = drawn(f"all-but-{left_out}", "meta", draws=60)
    assert set(seen) == {heights[name] for name in NAMES if name != left_out}
    for name in set(NAMES) - {left_out}:
        meta, _ = halves(made_up[name])
        assert seen[heights[name]] <= {int(i) for i in meta.pixels[:, 0, 0, 0]}
    family = build_tasks(f"all-but-{left_out}")
    assert isinstance(family, TaskMixture)
    assert set(family.shares.values()) == {1 / 3}
    assert set(family.data_sets) == set(NAMES) - {left_out}
    assert family.halved


def test_record_says_what_was_trained_on_and_tested_on(
    made_up: dict[str, Images], tmp_path: Path
) -> None:
    changes = {
        "task": "fashion-half", "test_task": "mnist", "tasks_per_meta_step": 1, "epochs": 1,
        "runs_per_epoch": 1, "horizon": 10, "validation_runs": 2, "test_runs": 2,
    }  # fmt: skip
    recipe = recipe_from_json({**SMALL.to_json(), **changes})
    trainer = MetaTrainer(recipe, tmp_path / "run")
    trainer.train()
    record = load_record(trainer.finish())
    assert record["data_sets"] == ["fashion"]
    assert load_record(tmp_path / "run" / "best.safetensors")["data_sets"] == ["fashion"]
    assert record["test"]["task"] == "mnist"
    family = build_tasks("mnist")
    seeds = [(recipe.seed, "test", i) for i in range(2)]
    sums = summed_losses(trainer.ema_rule, family, recipe.horizon, seeds)
    assert record["test"]["mean"] == pytest.approx(sums.mean().item(), rel=1e-6)


def test_evaluation_on_images_trained_on_is_refused(
    made_up: dict[str, Images], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "seen.safetensors")
    save_rule(SGDRule(), path, {"data_sets": ["fashion", "cifar10"]})

    def check(checkpoint: str, *tasks: str) -> None:
        check_blind([checkpoint], {name: build_tasks(name) for name in tasks})

    check(path, "mnist", "fashion-half", "cifar10-half", "quadratic")
    check("diagonal", "fashion")
    with pytest.raises(ValueError, match=r"half of the cifar10 images.*'cifar10-half'"):
        check(path, "mnist", "cifar10")
    with pytest.raises(ValueError, match="the task 'fashion-resnet' draws on all of them"):
        check(path, "fashion-resnet")
    folder = str(tmp_path / "out")
    assert main(["evaluate", "--checkpoints", path, "--tasks", "fashion", "--output", folder]) == 1
    assert "evaluate on 'fashion-half'" in capsys.readouterr().err


def test_the_example_tests_on_what_it_never_trains_on(made_up: dict[str, Images]) -> None:
    recipe = load_recipe(str(EXAMPLES / "all_but_cifar10.toml"))
    assert isinstance(recipe, Recipe)
    assert recipe.test_task == "cifar10"
    assert set(build_tasks(recipe.task, TaskOptions("meta")).data_sets) == set(NAMES) - {"cifar10"}
