"""Evolution strategies on whole runs: the estimate, the trainer's files, and the command."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim import load_rule
from learned_optim.cli import main
from learned_optim.hub import model_card
from learned_optim.meta import MetaTrainer, whole_runs
from learned_optim.meta.data import DataOptions
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.populations._base import UnusableTaskError
from learned_optim.meta.populations.mixture import MIXTURES, TRAINED_FOR, Draw, draw
from learned_optim.meta.populations.quadratics import Quadratic
from learned_optim.meta.recipes import MIXTURE_NAMES, EvolutionRecipe, Recipe, recipe_from_json
from learned_optim.meta.sampler import Sampler
from learned_optim.meta.validation import read_references
from learned_optim.meta.whole_runs import (
    VALIDATION_SEEDS,
    Runs,
    TaskResult,
    meta_gradient,
    perturbations,
    training_seed,
)
from learned_optim.pretrained import load_record
from learned_optim.rules.classical import AdamConfig
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

SMALL = EvolutionRecipe(
    task="populations-2",
    rule=HorizonConfig(hidden_size=3),
    meta_steps=3,
    meta_lr=1e-2,
    meta_lr_final=1e-3,
    tasks_per_meta_step=2,
    pairs=2,
    validation_tasks=2,
    validation_every=2,
)


@pytest.fixture(autouse=True)
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Short runs on quadratics in the place of the mixture; seeds, and whether large."""
    drawn = []

    def draw(seed: int, data: DataOptions, mixture: str, shortest: int, large: bool) -> Draw:
        drawn.append((seed, large))
        sampler = Sampler(torch.Generator().manual_seed(seed))
        return Draw(Quadratic(sampler, data), steps=8, known=seed % 2 == 0)

    monkeypatch.setattr(whole_runs, "draw", draw)
    monkeypatch.setattr(whole_runs, "load_images", lambda *_: None)
    return drawn


def result(seed: int, fitness: Tensor | None) -> TaskResult:
    return TaskResult(seed, "Quadratic", fitness)


# ---- the estimate


def test_the_estimate_by_hand() -> None:
    """Differences are compressed; a task without finite fitness is left out."""
    plus, minus = torch.tensor([0.5, 0.0, 20.0]), torch.tensor([0.1, 0.0, 0.0])
    good = result(3, torch.cat((plus, minus)).double())
    bad = [result(4, None), result(5, torch.full((6,), math.nan).double())]
    gradient, used = meta_gradient([good, *bad], 3, 4)
    assert used == [good]
    directions = perturbations(3, 3, 4)
    expected = (math.asinh(20) * directions[0] + math.asinh(150) * directions[2]) / 3
    torch.testing.assert_close(gradient, expected)


def test_meta_optimizer_is_adam_with_a_cosine_and_an_average() -> None:
    """The average is a plain mean of all weights at first, those before training included."""
    rule = HorizonRule(HorizonConfig(hidden_size=3))
    optimizer = MetaOptimizer(
        rule, meta_lr=1e-2, meta_lr_final=1e-3, average=0.98, betas=(0.9, 0.99), clip_norm=None
    )
    param = torch.nn.Parameter(optimizer.weights.clone())
    adam = torch.optim.Adam([param], betas=(0.9, 0.99))
    seen = [optimizer.weights.clone()]
    for step in range(40):
        gradient = torch.randn_like(param)
        optimizer.step(gradient, step / 40)
        meta_lr = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * step / 40))
        assert optimizer.lr == pytest.approx(meta_lr)
        adam.param_groups[0]["lr"], param.grad = meta_lr, gradient
        adam.step()
        seen.append(optimizer.weights.clone())
        torch.testing.assert_close(seen[-1], param.detach())
    kept = parameters_to_vector(optimizer.ema_rule.parameters())
    torch.testing.assert_close(kept, torch.stack(seen).mean(0), rtol=1e-3, atol=1e-5)


# ---- the trainer


def test_validation_is_against_tuned_adamw(tmp_path: Path) -> None:
    """References are run once; the averaged weights' excess is reported, and they are kept."""
    trainer, told = MetaTrainer(SMALL, tmp_path), []
    trainer.train(told.append)
    assert sum(text.startswith("AdamW ") for text in told) == 2
    references = read_references(tmp_path)
    assert [reference.index for reference in references] == [0, 1]
    assert all(len(reference.scores) == 6 for reference in references)
    weights = parameters_to_vector(trainer.ema_rule.parameters()).detach()
    runs = Runs(SMALL, DataOptions(), None)
    excess = [runs.validate((i, weights)) - min(references[i].scores) for i in range(2)]
    found = trainer.record()["behind_adamw"]["average"]
    assert found["mean"] == trainer.history[-1].validation
    assert found["mean"] == pytest.approx(np.minimum(excess, 1.5).mean())
    assert found["share_ahead"] == np.mean([e < 0 for e in excess])
    assert trainer.history[-1].ratio_to_adamw == pytest.approx(math.exp(found["mean"]))
    assert [m.round for m in trainer.history if m.validation is not None] == [2, 3]
    MetaTrainer(SMALL, tmp_path).train(lambda _: pytest.fail("nothing is left to do"))
    # The checkpoint has the weights of the end, whatever validation was best, and their record.
    path = trainer.finish()
    assert path == tmp_path / f"{tmp_path.name}.safetensors"
    rule, record = load_rule(path), load_record(path)
    assert rule.fingerprint() == trainer.ema_rule.fingerprint()
    assert (rule.warmup_steps, rule.trained_steps) == (0, 3000)
    assert recipe_from_json(record["recipe"]) == SMALL
    assert (record["meta_steps"], record["dropped"]) == (3, 0)
    assert record["behind_adamw"]["average"]["mean"] == found["mean"]
    assert load_rule(tmp_path / "best.safetensors").name == "horizon"
    (tmp_path / "references.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"references\.json is damaged .*delete it"):
        trainer.validate()


@pytest.mark.parametrize(("share", "large"), [(1.0, [True, True]), (0.5, [True, False])])
def test_tasks_grow_from_the_meta_step_that_is_named(
    share: float, large: list[bool], tmp_path: Path, draws: list[tuple[int, bool]]
) -> None:
    trainer = MetaTrainer(replace(SMALL, large_from=2, large_share=share), tmp_path)
    trainer.train()
    trained = [big for seed, big in draws if seed not in VALIDATION_SEEDS]
    assert trained == [False] * 4 + large


def test_tasks_that_fail_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = whole_runs.roll

    def roll(rule: Any, weights: Tensor, run: Draw, seed: int) -> Any:
        if seed % 2 and seed not in VALIDATION_SEEDS:
            raise ValueError("no decomposition")
        return good(rule, weights, run, seed)

    monkeypatch.setattr(whole_runs, "roll", roll)
    trainer = MetaTrainer(replace(SMALL, meta_steps=2), tmp_path)
    trainer.train()
    skipped = [line.details["skipped"] for line in trainer.history]
    assert [[s["error"] for s in line] for line in skipped] == [
        ["ValueError: no decomposition"]
    ] * 2
    assert trainer.record()["dropped"] == 2


def refused(recipe: EvolutionRecipe | Recipe, folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        MetaTrainer(recipe, folder, **options)


def test_bad_trainings_are_refused(tmp_path: Path) -> None:
    refused(replace(SMALL, rule=AdamConfig()), tmp_path, "rule 'adam' has no weights to train")
    refused(SMALL, tmp_path, "workers must be at least 1, got 0", workers=0)
    refused(SMALL, tmp_path, "against_adamw=False does not apply", against_adamw=False)
    MetaTrainer(SMALL, tmp_path)
    gradient = Recipe(task="quadratic", rule=SMALL.rule, epochs=1, meta_lr=1e-3)
    refused(gradient, tmp_path, r"another recipe \(.*method: evolution there, None here")


def test_training_never_has_a_validation_seed(
    tmp_path: Path, draws: list[tuple[int, bool]]
) -> None:
    """Numbers of seed 99 begin where validation's seeds do."""
    numbers = [0, 1, VALIDATION_SEEDS.start - 1, VALIDATION_SEEDS.start, VALIDATION_SEEDS.stop]
    found = [training_seed(number) for number in numbers]
    assert len(set(found)) == len(found)
    assert not set(found) & set(VALIDATION_SEEDS)
    MetaTrainer(replace(SMALL, seed=99), tmp_path).train()
    assert len({seed for seed, _ in draws if seed not in VALIDATION_SEEDS}) == 6


# ---- recipes and the command


def test_names_of_mixtures() -> None:
    assert MIXTURE_NAMES == tuple(MIXTURES) == tuple(TRAINED_FOR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "revolution"}, "unknown method 'revolution'; known: evolution"),
        ({"task": "mnist"}, "task 'mnist' needs a horizon, the inner steps of its runs"),
        ({"horizon": 100}, "horizon=100 does not apply to the mixture 'populations-2'"),
        ({"task": "mnist", "horizon": 0}, "horizon must be at least 1, got 0"),
        ({"epochs": 2}, "unknown field 'epochs'"),
        ({"large_share": 1.5}, r"large_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_recipe_fields_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_json({**SMALL.to_json(), **changes})


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "run", tmp_path / "out.safetensors"
    command = [
        "train", "diagonal", "--meta-steps", "2", "--tasks-per-meta-step", "2", "--pairs", "1",
        "--validation-tasks", "2", "--folder", str(folder), "--output", str(output),
    ]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    figures, wrote = captured.out.splitlines()
    ratio = load_record(output)["ratio_to_adamw"]
    assert figures.startswith(
        f"final loss on 2 validation runs: {ratio:.2f} of tuned AdamW's (geometric mean), ahead on"
    )
    assert f"{ratio:.2f} of tuned AdamW's" in captured.err
    assert wrote == f"wrote {output}"
    assert "2/2" in captured.err


# ---- records and draws


def test_the_card_tells_the_validation_of_the_weights_of_the_file() -> None:
    """The file holds the average of the weights, not the last ones."""
    rule, record = load_rule("diagonal"), load_record("diagonal")
    found = math.exp(record["behind_adamw"]["average"]["mean"])
    assert found == pytest.approx(0.912, abs=5e-4)
    assert "final loss is 0.912 times tuned AdamW's" in model_card(rule, "me/x", record=record)


def test_only_unusable_tasks_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a population's constructor is no unusable task."""

    class Faulty(Quadratic):
        def __init__(self, sampler: Sampler, data: DataOptions) -> None:
            raise error

    monkeypatch.setitem(MIXTURES, "faulty", {Faulty: 1})
    error: ValueError = ValueError("sizes do not match")
    with pytest.raises(ValueError, match="sizes do not match"):
        draw(0, DataOptions(), "faulty")
    error = UnusableTaskError("diverged")
    with pytest.raises(ValueError, match="no usable task in 50 draws"):
        draw(0, DataOptions(), "faulty")
