"""Evolution strategies: the estimate, the trainer's files, and the command."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import stop_at
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim import load_rule
from learned_optim.checkpoint import save_rule
from learned_optim.cli import main
from learned_optim.hub import model_card
from learned_optim.meta import MetaTrainer, evolution_jobs, evolution_tasks, whole_runs
from learned_optim.meta.data import DataOptions
from learned_optim.meta.evolution_jobs import (
    VALIDATION_SEEDS,
    TaskResult,
    ValidationJob,
    meta_gradient,
    perturbations,
    training_seed,
    validate_task,
    worker_map,
)
from learned_optim.meta.evolution_tasks import RunSource
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Validation
from learned_optim.meta.populations import MIXTURES, TRAINED_FOR, Draw, draw
from learned_optim.meta.populations._base import UnusableTaskError
from learned_optim.meta.populations.quadratics import Quadratic
from learned_optim.meta.progress import TrainingError
from learned_optim.meta.recipes import EvolutionRecipe, Recipe, load_recipe, recipe_from_json
from learned_optim.meta.recipes._evolution import MIXTURE_NAMES
from learned_optim.meta.references import read_references
from learned_optim.meta.sampler import Sampler
from learned_optim.pretrained import load_record
from learned_optim.rules.classical import AdamConfig
from learned_optim.rules.equivariant import EquivariantConfig
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

SMALL = EvolutionRecipe(
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
def _quadratics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs on quadratics in the place of the mixture, and no data."""

    def draw(seed: int, data: DataOptions, *rest: Any, **options: Any) -> Draw:
        sampler = Sampler(torch.Generator().manual_seed(seed))
        return Draw(Quadratic(sampler, data), steps=8, known=seed % 2 == 0)

    monkeypatch.setattr(evolution_tasks, "draw", draw)
    monkeypatch.setattr(whole_runs, "load_images", lambda *_: None)


def result(seed: int, fitness: Tensor | None) -> TaskResult:
    return TaskResult(seed, "Quadratic", fitness, 0.0)


# ---- the estimate


def test_the_estimate_points_uphill() -> None:
    """On a quadratic bowl it is close to the gradient, in direction, and following it descends."""
    count, pairs, sigma = 12, 64, 0.03
    target, weights = torch.randn(count), torch.zeros(count)

    def fitness(points: Tensor) -> Tensor:
        return (points - target).square().sum(1).double()

    def estimate(weights: Tensor, step: int) -> Tensor:
        results = []
        for seed in range(8 * step, 8 * step + 8):
            change = sigma * perturbations(seed, pairs, count)
            results.append(result(seed, fitness(torch.cat((weights + change, weights - change)))))
        gradient, used = meta_gradient(results, pairs, count)
        assert len(used) == 8
        return gradient

    true = 2 * (weights - target)
    assert torch.cosine_similarity(estimate(weights, 0), true, dim=0) > 0.9
    first = fitness(weights[None])
    for step in range(40):
        weights = weights - 0.05 * estimate(weights, step)
    assert fitness(weights[None]) < 0.1 * first


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


def test_untrained_weights_follow_the_seed(tmp_path: Path) -> None:
    def hidden(seed: int) -> Tensor:
        trainer = MetaTrainer(
            replace(SMALL, seed=seed), tmp_path / str(len(list(tmp_path.iterdir())))
        )
        rule = trainer.rule
        assert isinstance(rule, HorizonRule)
        assert all(not weight.any() for weight in [*rule.readout.parameters(), rule.direct.weight])
        return rule.hidden.weight

    assert torch.equal(hidden(0), hidden(0))
    assert not torch.equal(hidden(0), hidden(1))


def test_meta_optimizer_is_adam_with_a_cosine_and_an_average() -> None:
    """The average is a plain mean of all weights at first, those before training included."""
    rule = HorizonRule(HorizonConfig(hidden_size=3))
    optimizer = MetaOptimizer(
        rule, meta_lr=1e-2, meta_lr_final=1e-3, average=0.98, betas=(0.9, 0.99)
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
    kept = parameters_to_vector(optimizer.kept.parameters())
    torch.testing.assert_close(kept, torch.stack(seen).mean(0), rtol=1e-3, atol=1e-5)


# ---- the trainer


def figures(trainer: MetaTrainer) -> list[tuple[Any, ...]]:
    return [(m.meta_loss, m.validation, m.ratio_to_adamw, m.meta_lr) for m in trainer.history]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = MetaTrainer(SMALL, tmp_path / "whole")
    whole.train()
    for done in (1, 2):
        stop_at(MetaTrainer(SMALL, tmp_path / "parts"), done)
    parts = MetaTrainer(SMALL, tmp_path / "parts")
    assert parts.meta_steps == 2
    parts.train()
    for one, other in ((parts.rule, whole.rule), (parts.kept, whole.kept)):
        assert one.fingerprint() == other.fingerprint()
    assert figures(parts) == figures(whole)
    assert [m.round for m in parts.history if m.validation is not None] == [2, 3]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        ".lock", "best.safetensors", "metrics.jsonl", "protocol.json", "recipe.json",
        "references.json", "resume.pt",
    }  # fmt: skip
    MetaTrainer(SMALL, tmp_path / "parts").train(lambda _: pytest.fail("nothing is left to do"))


def test_validation_is_against_tuned_adamw(tmp_path: Path) -> None:
    """References are run once, and the excess of the averaged weights is reported."""
    trainer, told = MetaTrainer(SMALL, tmp_path), []
    trainer.train(told.append)
    assert sum(text.startswith("AdamW ") for text in told) == 2
    references = read_references(tmp_path)
    assert [reference.index for reference in references] == [0, 1]
    assert all(len(reference.scores) == 6 for reference in references)
    weights = parameters_to_vector(trainer.kept.parameters()).detach()[None]
    source = RunSource.of(SMALL, DataOptions())
    excess = [
        validate_task(ValidationJob(i, source, weights, SMALL.rule))[0] - min(references[i].scores)
        for i in range(2)
    ]
    found = trainer.record()["behind_adamw"]["average"]
    assert found["mean"] == trainer.history[-1].validation
    assert found["mean"] == pytest.approx(np.minimum(excess, 1.5).mean())
    assert found["share_ahead"] == np.mean([e < 0 for e in excess])
    assert trainer.history[-1].ratio_to_adamw == pytest.approx(math.exp(found["mean"]))
    (tmp_path / "references.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"references\.json is damaged .*delete it"):
        trainer.validate()


def test_finished_checkpoint(tmp_path: Path) -> None:
    """Averaged weights of the end, whatever validation was best, and the record of these."""
    trainer = MetaTrainer(SMALL, tmp_path / "run")
    trainer.train()
    path = trainer.finish()
    assert path == tmp_path / "run" / "run.safetensors"
    rule, record = load_rule(path), load_record(path)
    assert rule.fingerprint() == trainer.kept.fingerprint()
    assert (rule.warmup_steps, rule.trained_steps) == (0, 3000)
    assert recipe_from_json(record["recipe"]) == SMALL
    assert (record["meta_steps"], record["dropped"]) == (3, 0)
    assert record["behind_adamw"]["average"]["mean"] == trainer.history[-1].validation
    assert "- Meta-steps of evolution strategies: 3\n" in model_card(rule, "me/run", record=record)
    assert load_rule(tmp_path / "run" / "best.safetensors").name == "horizon"


def test_tasks_grow_from_the_meta_step_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, asked = evolution_tasks.draw, []

    def draw(seed: int, *rest: Any, **options: Any) -> Draw:
        asked.append(options.get("large"))
        return good(seed, *rest, **options)

    monkeypatch.setattr(evolution_tasks, "draw", draw)
    trainer = MetaTrainer(replace(SMALL, large_from=2, validation_every=9), tmp_path)
    monkeypatch.setattr(trainer.method, "validate", lambda *_: Validation(0.0))
    trainer.train()
    assert asked == [False] * 4 + [True] * 2
    asked.clear()
    share = replace(SMALL, large_from=2, large_share=0.5, validation_every=9)
    trainer = MetaTrainer(share, tmp_path / "share")
    monkeypatch.setattr(trainer.method, "validate", lambda *_: Validation(0.0))
    trainer.train()
    assert asked == [False] * 4 + [True, False]


def test_tasks_that_fail_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = evolution_tasks.draw

    def draw(seed: int, *rest: Any, **options: Any) -> Draw:
        if seed % 2:
            raise ValueError("no usable task")
        return good(seed, *rest, **options)

    monkeypatch.setattr(evolution_tasks, "draw", draw)
    trainer = MetaTrainer(replace(SMALL, validation_every=9, meta_steps=2), tmp_path)
    monkeypatch.setattr(trainer.method, "validate", lambda *_: Validation(0.0))
    trainer.train()
    skipped = [line.details["skipped"] for line in trainer.history]
    assert [[s["error"] for s in line] for line in skipped] == [["ValueError: no usable task"]] * 2
    assert trainer.record()["dropped"] == 2


def test_no_finite_fitness_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = MetaTrainer(SMALL, tmp_path)
    nan = torch.full((4,), math.nan).double()
    monkeypatch.setattr(evolution_jobs, "fitness", lambda *_: nan)
    with pytest.raises(TrainingError, match=r"meta-step 1 taught nothing.*no fitness was finite"):
        trainer.train()
    assert trainer.meta_steps == 0


def test_other_rules_can_be_trained(tmp_path: Path) -> None:
    trainer = MetaTrainer(replace(SMALL, rule=EquivariantConfig(hidden_size=2)), tmp_path)
    before = trainer.rule.fingerprint()
    trainer.train()
    assert trainer.rule.fingerprint() != before


def test_rules_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rule 'adam' has no weights to train"):
        MetaTrainer(replace(SMALL, rule=AdamConfig()), tmp_path)


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    MetaTrainer(SMALL, tmp_path).train()
    gradient = Recipe(task="quadratic", rule=SMALL.rule, epochs=1, meta_lr=1e-3)
    with pytest.raises(ValueError, match="a recipe of another method: choose another folder"):
        MetaTrainer(gradient, tmp_path)


def test_workers() -> None:
    with worker_map(2) as run:
        assert list(run(abs, [-1, 2, -3])) == [1, 2, 3]


# ---- recipes and the command


def test_recipes(tmp_path: Path) -> None:
    recipe = load_recipe("diagonal")
    assert isinstance(recipe, EvolutionRecipe)
    assert (recipe.meta_steps, recipe.tasks_per_meta_step, recipe.pairs) == (500, 10, 3)
    assert (recipe.sigma, recipe.meta_lr, recipe.meta_lr_final) == (0.03, 8e-3, 5e-4)
    assert recipe_from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    path = tmp_path / "mine.toml"
    path.write_text(
        'method = "evolution"\nrule = "horizon"\nmeta_steps = 2\nmeta_lr = 1e-2\n'
        "meta_lr_final = 1e-3\n"
    )
    assert load_recipe(str(path)) == EvolutionRecipe(HorizonConfig(), 2, 1e-2, 1e-3)
    assert MIXTURE_NAMES == tuple(MIXTURES) == tuple(TRAINED_FOR)
    for changes, message in (
        ({"method": "revolution"}, "unknown method 'revolution'; known: evolution"),
        ({"task": "mnist"}, "task 'mnist' needs a horizon, the inner steps of its runs"),
        ({"horizon": 100}, "horizon=100 does not apply to the mixture 'populations-2'"),
        ({"task": "mnist", "horizon": 0}, "horizon must be at least 1, got 0"),
        ({"epochs": 2}, "unknown field 'epochs'"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"large_share": 1.5}, r"large_share must be in \[0, 1\], got 1.5"),
        ({"meta_steps": "many"}, "meta_steps must be int"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_from_json({**SMALL.to_json(), **changes})


TINY = [
    "--meta-steps", "2", "--tasks-per-meta-step", "2", "--pairs", "1", "--validation-tasks", "2",
]  # fmt: skip


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(tmp_path / "run")
    output = tmp_path / "out.safetensors"
    command = ["train", "diagonal", *TINY, "--folder", folder, "--output", str(output)]
    assert main([*command, "--tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("runs_per_second", "seconds_left", "meta_loss"):
        values = [line[name] for line in lines]
        assert [s.value for s in events.Scalars(name)] == pytest.approx(values)
    assert [s.step for s in events.Scalars("ratio_to_adamw")] == [2]
    captured = capsys.readouterr()
    figures, wrote = captured.out.splitlines()
    ratio = load_record(output)["ratio_to_adamw"]
    assert figures.startswith(
        f"final loss on 2 validation runs: {ratio:.2f} of tuned AdamW's (geometric mean), ahead on"
    )
    assert f"{ratio:.2f} of tuned AdamW's" in captured.err
    assert wrote == f"wrote {output}"
    assert "2/2" in captured.err
    first = load_rule(output).fingerprint()
    assert main(["train", folder, "--output", str(output)]) == 0  # goes on: there is nothing to do
    assert load_rule(output).fingerprint() == first
    assert main(["show", str(output)]) == 0


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        MetaTrainer(SMALL, tmp_path, workers=0)
    with pytest.raises(ValueError, match="against_adamw=False does not apply"):
        MetaTrainer(SMALL, tmp_path, against_adamw=False)


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "diagonal", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--meta-steps INT" in shown
    assert "--epochs" not in shown
    assert all(flag in shown for flag in ("--sigma FLOAT", "--workers INT"))


# ---- starting from a checkpoint


def test_start_from_a_rule_of_the_same_kind_and_size(tmp_path: Path) -> None:
    old = HorizonRule(HorizonConfig(hidden_size=3))
    for weight in old.parameters():
        torch.nn.init.normal_(weight)
    save_rule(old, tmp_path / "old.safetensors", {})
    recipe = replace(SMALL, rule=old.config, start=str(tmp_path / "old.safetensors"))
    trainer = MetaTrainer(recipe, tmp_path / "run")
    assert all(map(torch.equal, trainer.kept.parameters(), old.parameters()))
    for rule in (HorizonConfig(hidden_size=4), EquivariantConfig()):
        with pytest.raises(ValueError, match="must be of one kind and size"):
            MetaTrainer(replace(recipe, rule=rule), tmp_path / rule.__class__.__name__)


# ---- truth of the records


@given(numbers=st.lists(st.integers(0, 10**8), min_size=2, max_size=50, unique=True))
def test_training_never_has_a_validation_seed(numbers: list[int]) -> None:
    """Those of seed 99 begin where validation's do; different numbers have different seeds."""
    edges = [100_000 * 100, VALIDATION_SEEDS.start - 1, VALIDATION_SEEDS[-1], VALIDATION_SEEDS.stop]
    found = [training_seed(number) for number in {*numbers, *edges}]
    assert not set(found) & {*range(VALIDATION_SEEDS.start, VALIDATION_SEEDS.start + 10)}
    assert all(seed not in VALIDATION_SEEDS for seed in found)
    assert len(set(found)) == len(found)


def test_seed_99_trains_on_other_tasks_than_it_validates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, seeds = evolution_tasks.draw, {"train": [], "validate": []}

    def draw(seed: int, *rest: Any, **options: Any) -> Draw:
        seeds["train" if "large" in options else "validate"].append(seed)
        return good(seed, *rest, **options)

    monkeypatch.setattr(evolution_tasks, "draw", draw)
    MetaTrainer(replace(SMALL, seed=99), tmp_path).train()
    assert len(set(seeds["train"])) == 6
    assert not set(seeds["train"]) & set(seeds["validate"])


def test_the_card_tells_the_validation_of_the_weights_of_the_file() -> None:
    """That of the average of the weights, which is kept, and not of the last ones."""
    rule, record = load_rule("diagonal"), load_record("diagonal")
    found = math.exp(record["behind_adamw"]["average"]["mean"])
    assert found == pytest.approx(0.912, abs=5e-4)
    assert "final loss is 0.912 times tuned AdamW's" in model_card(rule, "me/x", record=record)
    record["behind_adamw"] = {"average": {"mean": math.log(0.5)}, "last": {"mean": math.log(0.25)}}
    assert "the final loss is 0.500 times" in model_card(rule, "me/x", record=record)


def test_the_card_tells_the_longest_runs_of_training() -> None:
    """A quarter of them were longer than the recipe's horizon."""
    card = model_card(load_rule("coordinatewise"), "me/x", record=load_record("coordinatewise"))
    assert "Trained on runs of up to 2,000 steps and tested on runs of 200;" in card


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
