"""Validation against tuned AdamW of a meta-training by unrolls."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compat.common import descend
from test_trainer import SMALL as trainer_recipe
from torch import Generator, Tensor, nn

from learned_optim.meta import FixedTask, MetaTrainer, ModuleTask, TaskMixture
from learned_optim.meta.seeding import seeded
from learned_optim.meta.validation import (
    ADAMW_LRS,
    Reference,
    mean_of,
    read_references,
    summed_losses,
    tuned_sums,
)

SMALL = replace(
    trainer_recipe, epochs=2, meta_lr_final=None, runs_per_epoch=2, tasks_per_meta_step=3,
    horizon=6, truncation=3, validation_runs=5,
)  # fmt: skip


def module_task(scale: float = 1.0, *extra: nn.Module) -> ModuleTask:
    def batches(generator: Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 3, generator=generator)
        return x, scale * x[:, :1]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1))

    return ModuleTask(build, batches, nn.functional.mse_loss)


@pytest.mark.parametrize("stackable", [True, False])
def test_adamw_is_torchs(stackable: bool) -> None:
    """Packed and side by side, runs are those of each task's parameters alone."""
    task = module_task()
    family = FixedTask(task, stackable=stackable)
    seeds: list[tuple[object, ...]] = [("run", 0), ("run", 1), ("run", 2)]
    found = summed_losses(0.03, family, 5, seeds, together=2 if stackable else 1)

    def alone(seed: tuple[object, ...]) -> float:
        generator = seeded(*seed)
        params = {n: nn.Parameter(p) for n, p in task.init(generator).items()}
        adamw = torch.optim.AdamW(params.values(), lr=0.03)
        return sum(descend(adamw, 5, lambda: task.loss(params, task.batch(generator))))

    assert found.tolist() == pytest.approx([*map(alone, seeds)], rel=1e-5)


def test_ratio_is_of_the_same_runs(tmp_path: Path) -> None:
    trainer = MetaTrainer(SMALL, tmp_path)
    told: list[str] = []
    trainer.train(told.append)
    references = read_references(tmp_path)
    assert [len(r.scores) for r in references] == [len(ADAMW_LRS)] * 5
    assert len({r.task for r in references}) == 5  # every quadratic function is a task of its own
    adamw = sum(r.best for r in references) / 5
    for line in trainer.history:
        assert line.ratio_to_adamw == pytest.approx(line.validation / adamw)
        assert line.runs_per_second == pytest.approx(2 * 3 / line.seconds)
    assert trainer.history[-1].seconds_left == 0
    assert "AdamW 40/40" in told
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["ratio_to_adamw"] for line in lines] == [m.ratio_to_adamw for m in trainer.history]
    assert trainer.record()["ratio_to_adamw"] == trainer.best.ratio_to_adamw


def test_runs_of_one_task_share_a_rate(tmp_path: Path) -> None:
    """Of a mixture, every member has its own."""
    mixture = TaskMixture({"small": module_task(), "large": module_task(100.0)})
    recipe = replace(SMALL, epochs=1, validation_runs=12)
    MetaTrainer(recipe, tmp_path, family=mixture).train()
    assert {reference.task for reference in read_references(tmp_path)} == {"task 0", "task 1"}
    rows = [("a", (3.0, 2.0)), ("a", (3.0, 5.0)), ("b", (4.0, 1.0))]
    found = [Reference(i, task, scores) for i, (task, scores) in enumerate(rows)]
    assert tuned_sums(found).tolist() == [3.0, 3.0, 1.0]
    assert tuned_sums([replace(found[0], scores=(math.inf, 7.0))]).tolist() == [7.0]


@pytest.mark.parametrize(
    ("sums", "geometric", "expected"),
    [
        ([1.0, 4.0], False, 2.5),
        ([1.0, 4.0], True, 2.0),
        ([-1.0, 4.0], True, math.inf),
        ([1.0, math.inf], False, math.inf),
    ],
)
def test_means_of_sums(sums: list[float], geometric: bool, expected: float) -> None:
    assert mean_of(torch.tensor(sums), geometric) == pytest.approx(expected)
