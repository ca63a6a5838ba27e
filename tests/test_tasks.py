"""Tasks: what the thesis defines, and the split that keeps meta-training honest."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from compat.common import descend

from learned_optim.meta import TaskOptions, build_tasks, task_names
from learned_optim.meta.data import DATA_VARIABLE, DataOptions, Images, halves
from learned_optim.meta.seeding import seeded

THESIS = {
    "mnist": (784, [20], 10),
    "mnist-40": (784, [40], 10),
    "mnist-2layer": (784, [20, 20], 10),
    "mnist-relu": (784, [20], 10),
    "fashion": (784, [20], 10),
    "emnist-letters": (784, [20], 26),
    "cifar10": (3072, [20], 10),
}


def test_names() -> None:
    names = {"quadratic", "digits", *THESIS, *(f"{name}-torch" for name in THESIS)}
    assert names <= set(task_names())
    with pytest.raises(ValueError, match=r"unknown task 'mnits'; known: .*mnist-2layer"):
        build_tasks("mnits")


def test_tasks_of_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks_of_mine.py").write_text(
        "from learned_optim.meta.tasks.quadratic import Quadratics\n"
        "FAMILIES = {'small': lambda options: Quadratics(size=3)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = build_tasks("tasks_of_mine:small").sample(seeded("q"))
    assert task.batch(seeded("unused"))[0].shape == (3, 3)
    with pytest.raises(
        ValueError, match="unknown task 'tasks_of_mine:big'; known: tasks_of_mine:s"
    ):
        build_tasks("tasks_of_mine:big")
    with pytest.raises(ValueError, match=r"no tasks from module 'nowhere' \(No module named"):
        build_tasks("nowhere:small")
    with pytest.raises(ValueError, match=r"no tasks from module 'json' .* define FAMILIES"):
        build_tasks("json:small")


def test_quadratic_by_hand() -> None:
    task = build_tasks("quadratic").sample(seeded("q"))
    w, y = task.batch(seeded("unused"))
    params = task.init(seeded("unused"))
    assert torch.equal(params["theta"], torch.zeros(10))
    assert task.loss(params, (w, y)).item() == pytest.approx(y.square().sum().item())
    theta = torch.arange(10.0)
    expected = ((w @ theta - y) ** 2).sum()
    torch.testing.assert_close(task.loss({"theta": theta}, (w, y)), expected)
    family, generator = build_tasks("quadratic"), seeded("many")
    w = torch.stack([family.sample(generator).w for _ in range(500)])
    assert w.shape == (500, 10, 10)
    assert abs(w.mean().item()) < 0.02
    assert w.std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", THESIS)
def test_thesis_networks(name: str, image_data: DataOptions) -> None:
    inputs, hidden, classes = THESIS[name]
    task = build_tasks(name, TaskOptions(data=image_data)).sample(seeded(0))
    generator = seeded(1)
    params = task.init(generator)
    widths = [inputs, *hidden, classes]
    shapes = [s for i, o in pairwise(widths) for s in ((o, i), (o,))]
    assert [tuple(p.shape) for p in params.values()] == shapes
    weights = torch.cat([p.flatten() for p in params.values() if p.dim() > 1])
    assert weights.std().item() == pytest.approx(0.001, rel=0.05)
    assert all(not p.any() for p in params.values() if p.dim() == 1)
    x, y = task.batch(generator)
    assert x.shape[0] == y.shape[0] == 128
    assert x.min() >= 0.0
    assert 0.5 < x.max() <= 1.0
    assert 0 <= y.min() < y.max() < classes
    assert task.loss(params, (x, y)).item() == pytest.approx(math.log(classes), 0.01)
    assert 0.0 <= task.test(params)["accuracy"] <= 2.5 / classes


def test_torch_initialization_is_pytorchs() -> None:
    """It follows from the seed and leaves the global generator alone."""
    task, before = build_tasks("digits-torch").sample(seeded(0)), torch.get_rng_state()
    params = task.init(seeded(1))
    assert params["1.weight"].abs().max() <= 1 / 8  # U(-1/sqrt(64), 1/sqrt(64))
    assert params["1.weight"].std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    again, other = task.init(seeded(1)), task.init(seeded(2))
    assert all(torch.equal(params[n], again[n]) for n in params)
    assert not torch.equal(params["1.weight"], other["1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_halves_are_disjoint_complete_and_fixed() -> None:
    images = Images(torch.zeros(101, 1, 1, 1, dtype=torch.uint8), torch.arange(101), 101)
    meta, evaluation = halves(images)
    assert len(meta) == 50
    assert sorted(meta.labels.tolist() + evaluation.labels.tolist()) == list(range(101))
    # Pinned: a change of the split would silently mix the halves of earlier checkpoints.
    assert meta.labels[:5].tolist() == [64, 40, 58, 75, 59]


def test_missing_data_names_folder_variable_and_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    options = TaskOptions(data=DataOptions(download=False))
    with pytest.raises(FileNotFoundError) as error:
        build_tasks("mnist", options)
    for part in (str(tmp_path), "downloading is switched off", "--data-dir", f"${DATA_VARIABLE}"):
        assert part in str(error.value)


# ---- what users train


def test_running_statistics_start_afresh_and_are_used_in_the_test(image_data: DataOptions) -> None:
    task = build_tasks("mnist-cnn-bn", TaskOptions(data=image_data)).sample(seeded(0))
    params = task.init(seeded(1))
    count = 8 * 9 + 8 + 16 * 72 + 16 + 10 * 16 * 49 + 10 + 2 * (8 + 16)
    assert sum(p.numel() for p in params.values()) == count
    first = task.test(params)
    assert 0.02 < first["accuracy"] < 0.3
    for step in range(20):
        task.loss(params, task.batch(seeded(step)))
    assert task.test(params) != first
    assert task.module.training
    task.init(seeded(1))
    assert task.test(params) == first


@pytest.mark.parametrize("name", ["char-lm-gru", "char-lm-transformer"])
def test_language_models(name: str, tmp_path: Path) -> None:
    text = "to be, or not to be: that is the question. " * 60
    (tmp_path / "hamlet.txt").write_text(text)
    options = TaskOptions(data=DataOptions(text=tmp_path / "hamlet.txt"))
    task = build_tasks(name, options).sample(seeded(0))
    params = {n: p.requires_grad_() for n, p in task.init(seeded(1)).items()}
    x, y = task.batch(seeded(2))
    assert x.shape == y.shape == (16, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])  # targets are the inputs, one character on
    vocabulary = len(set(text))
    assert task.loss(params, (x, y)).item() == pytest.approx(math.log(vocabulary), rel=0.2)
    # A later character must not change what is predicted before it.
    changed = x.clone()
    changed[:, 40] = (changed[:, 40] + 1) % vocabulary
    before, after = (
        torch.func.functional_call(task.module, params, (tokens,)) for tokens in (x, changed)
    )
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])
    optimizer, generator = torch.optim.Adam(params.values(), lr=0.01), seeded(3)
    descend(optimizer, 40, lambda: task.loss(params, task.batch(generator)))
    trained = task.test({n: p.detach() for n, p in params.items()})["loss"]
    assert trained < 0.75 * math.log(vocabulary)


def test_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("brief")
    with pytest.raises(ValueError, match="has 5 characters; at least 650 are needed"):
        build_tasks("char-lm-gru", TaskOptions(data=DataOptions(text=tmp_path / "short.txt")))


def test_mixture_of_small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of member trains: finite losses that a plain SGD step lowers, no global state."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(64) % 10, 10)
    monkeypatch.setattr("learned_optim.meta.tasks.small_tasks.load_images", lambda *_: images)
    family = build_tasks("small-tasks", TaskOptions("meta"))
    assert not family.stackable
    kinds, lowered, global_state = set(), 0, torch.get_rng_state()
    for seed in range(60):
        draws = seeded("small-tasks", seed)
        task = family.sample(draws)
        kinds.add(type(getattr(task, "module", task)).__name__)
        params = {n: p.requires_grad_() for n, p in task.init(draws).items()}
        batch = task.batch(draws)
        loss = task.loss(params, batch)
        grads = torch.autograd.grad(loss, list(params.values()))
        assert torch.isfinite(loss)
        step = 1e-3 / (1e-9 + sum(g.square().sum() for g in grads).sqrt())
        moved = {n: p - step * g for (n, p), g in zip(params.items(), grads, strict=True)}
        lowered += bool(task.loss(moved, batch) <= loss)
        draws = seeded("small-tasks", seed)
        twin = family.sample(draws)
        again = twin.init(draws)
        assert all(torch.equal(again[n], p.detach()) for n, p in params.items())
        assert all(torch.equal(a, b) for a, b in zip(twin.batch(draws), batch, strict=True))
    assert lowered >= 57
    assert torch.equal(torch.get_rng_state(), global_state)
    assert kinds >= {"Sequential", "SequenceNet", "IllConditioned", "Quadratic"}


@pytest.mark.parametrize("name", task_names())
def test_splits_differ_or_are_refused(
    name: str, data_for: Callable[[bool], DataOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No family gives meta-training what evaluation will see; a refusal loads nothing."""
    halved = ("mnist", "digits", "quadratic", "small-tasks", "all-but")
    if not name.startswith(halved) and not name.endswith("-half"):
        for module in ("images", "_examples"):
            loader = f"learned_optim.meta.tasks.{module}.load_images"
            monkeypatch.setattr(loader, lambda *_: pytest.fail("loaded"))
        with pytest.raises(ValueError, match="for evaluation only: meta-training on it would leak"):
            build_tasks(name, TaskOptions("meta"))
        return
    if name == "quadratic":
        return  # fresh random functions for everybody: there is nothing to leak
    data, batches = data_for(True), []
    for split in ("meta", "evaluation"):
        draws = seeded("split", name)
        batches.append(build_tasks(name, TaskOptions(split, data)).sample(draws).batch(draws))
    assert not torch.equal(batches[0][0], batches[1][0])
