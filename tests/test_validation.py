"""Validation against tuned AdamW, pace and time left of a meta-training by unrolls."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from learned_optim.meta import FixedTask, MetaTrainer, ModuleTask, Recipe, TaskMixture, build_tasks
from learned_optim.meta import validation as module
from learned_optim.meta.progress import pace_text, seconds_left, time_text
from learned_optim.meta.references import Reference, mean_sum, read_references, tuned_sums
from learned_optim.meta.seeding import seeded
from learned_optim.meta.validation import ADAMW_LRS, Validator, adamw_sums
from learned_optim.rules.lstm import LSTMConfig

SMALL = Recipe(
    task="quadratic",
    rule=LSTMConfig(preprocessing="raw", output_scale=1.0, hidden_size=4, num_layers=1),
    epochs=2,
    meta_lr=0.01,
    runs_per_epoch=2,
    tasks_per_meta_step=3,
    horizon=6,
    truncation=3,
    validation_runs=5,
    test_runs=2,
)


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
    found = adamw_sums(0.03, family, 5, seeds, together=2 if stackable else 1)
    for seed, total in zip(seeds, found.tolist(), strict=True):
        generator = seeded(*seed)
        params = {n: nn.Parameter(p) for n, p in task.init(generator).items()}
        adamw, expected = torch.optim.AdamW(params.values(), lr=0.03), 0.0
        for _ in range(5):
            adamw.zero_grad()
            loss = task.loss(dict(params), task.batch(generator))
            loss.backward()
            adamw.step()
            expected += loss.item()
        assert total == pytest.approx(expected, rel=1e-5)


def test_dropout_draws_the_same_masks_for_every_rate() -> None:
    family = FixedTask(module_task(1.0, nn.Dropout(0.5)))
    sums = [adamw_sums(1e-12, family, 4, [("run", 0)]).item() for _ in range(2)]
    assert sums[0] == sums[1]


def test_ratio_is_of_the_same_runs(tmp_path: Path) -> None:
    trainer = MetaTrainer(SMALL, tmp_path)
    told: list[str] = []
    trainer.train(told.append)
    references = read_references(tmp_path)
    assert [len(r.scores) for r in references] == [len(ADAMW_LRS)] * 5
    assert len({r.task for r in references}) == 5  # every quadratic function is a task of its own
    adamw = sum(min(r.scores) for r in references) / 5
    for line in trainer.history:
        assert line.ratio_to_adamw == pytest.approx(line.validation / adamw)
        assert line.runs_per_second == pytest.approx(2 * 3 / line.seconds)
    assert trainer.history[-1].seconds_left == 0
    assert "AdamW 40/40" in told
    column = adamw_sums(ADAMW_LRS[-1], trainer.method.family, 6, trainer.method.validator.seeds)
    assert [r.scores[-1] for r in references] == pytest.approx(column.tolist())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["ratio_to_adamw"] for line in lines] == [m.ratio_to_adamw for m in trainer.history]
    best = trainer.best
    assert best is not None
    assert trainer.record()["ratio_to_adamw"] == best.ratio_to_adamw


def test_rates_that_are_done_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while AdamW is tuned costs one learning rate; a resumed run has the same ratio."""

    class Killed(Exception):
        pass

    run, rates, lives = adamw_sums, [], [4]

    def counted(lr: float, *rest: Any) -> Tensor:
        rates.append(lr)
        if len(rates) in lives:
            lives.clear()
            raise Killed
        return run(lr, *rest)

    monkeypatch.setattr(module, "adamw_sums", counted)
    with pytest.raises(Killed):
        MetaTrainer(SMALL, tmp_path / "parts").train()
    MetaTrainer(SMALL, tmp_path / "parts").train()
    assert rates == [*ADAMW_LRS[:4], *ADAMW_LRS[3:]]
    rates.clear()
    whole = MetaTrainer(SMALL, tmp_path / "whole")
    whole.train()
    again = MetaTrainer(replace(SMALL, epochs=3), tmp_path / "parts")
    again.train()
    assert len(rates) == len(ADAMW_LRS)
    assert [m.ratio_to_adamw for m in again.history[:2]] == [
        m.ratio_to_adamw for m in whole.history
    ]
    (tmp_path / "parts" / "references.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"references\.json is damaged .*delete it"):
        MetaTrainer(SMALL, tmp_path / "parts")


def test_without_adamw(tmp_path: Path) -> None:
    trainer = MetaTrainer(SMALL, tmp_path, against_adamw=False)
    trainer.train()
    assert not (tmp_path / "references.json").exists()
    assert [m.ratio_to_adamw for m in trainer.history] == [None, None]


def test_runs_of_one_task_share_a_rate() -> None:
    """Of a mixture, every member has its own; of one task, all runs have the same."""
    mixture = TaskMixture({"small": module_task(), "large": module_task(100.0)})
    validator = Validator(replace(SMALL, validation_runs=12), mixture)
    labels = {reference.task for reference in validator._blank_references()}
    assert labels == {"task 0", "task 1"}
    rows = [("a", (3.0, 2.0)), ("a", (3.0, 5.0)), ("b", (4.0, 1.0))]
    found = [Reference(i, task, 6, False, scores) for i, (task, scores) in enumerate(rows)]
    assert tuned_sums(found) == [3.0, 3.0, 1.0]
    diverged = [replace(found[0], scores=(math.inf, 7.0))]
    assert tuned_sums(diverged) == [7.0]


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
    assert mean_sum(sums, geometric) == pytest.approx(expected)


def test_a_ratio_without_meaning_is_none() -> None:
    validator = Validator(SMALL, build_tasks("quadratic"))
    assert validator.ratio_to_adamw(1.0) is None
    for adamw, validation, expected in ((2.0, 1.0, 0.5), (-2.0, 1.0, None), (2.0, math.inf, None)):
        validator._adamw = adamw
        assert validator.ratio_to_adamw(validation) == expected


def test_time_left_is_that_of_the_last_epochs() -> None:
    assert seconds_left([100.0] + [2.0] * 10, 5) == 10.0
    assert seconds_left([1.0, 3.0], 4) == 8.0
    assert [time_text(s) for s in (40.4, 720, 12600)] == ["40 s", "12 min", "3.5 h"]
    assert pace_text(12.345, 0.931) == "0.93 of tuned AdamW's, 12.3 runs/s"
    assert pace_text(None, None) == ""
