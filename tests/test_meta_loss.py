"""Meta-loss weightings, imitation and re-parametrisation, each against what defines it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_rule
from test_trainer import SMALL
from torch import Tensor

from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    FixedTask,
    MetaGradient,
    MetaTrainer,
    ModuleTask,
    Optimizees,
    build_tasks,
)
from learned_optim.meta.estimators import Estimator, Fitness
from learned_optim.meta.meta_loss import Imitation, LossWeights, imitation, loss_weights
from learned_optim.meta.recipes import recipe_from_json
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks._rescaled import Rescaled, RescaledTask
from learned_optim.rules import UpdateRule

LENGTH = 12
WEIGHTS = {
    "final": LossWeights(start=0.5, length=LENGTH, first=4),
    "positions": LossWeights(power=2.0, length=LENGTH, first=4),
    "log": LossWeights("log", length=LENGTH, first=4),
    "all": LossWeights("log", 0.5, 1.0, first=4, length=LENGTH),
}


def estimate(
    rule: UpdateRule,
    estimator: str,
    steps: int,
    options: EstimatorOptions | None = None,
    task: str = "quadratic",
    warm_up: int = 4,
) -> tuple[MetaGradient, Optimizees]:
    family = build_tasks(task)
    generators = [seeded("meta-loss", i) for i in range(2)]
    tasks = [family.sample(generator) for generator in generators]
    optimizees = Optimizees(rule, tasks, generators, torch.float64)
    for _ in range(warm_up):
        optimizees.advance(rule)
    estimate: Estimator = ESTIMATORS[estimator]
    return estimate(rule, optimizees, steps, options or EstimatorOptions()), optimizees


def directional(rule: UpdateRule, value: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """A random direction of the weights, and the central difference of ``value`` along it."""
    weights = list(rule.parameters())
    direction = [torch.randn_like(w) for w in weights]
    eps, found = 1e-6, []
    for step in (eps, -2 * eps, eps):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.add_(step * d)
        found.append(value())
    return direction, (found[0] - found[1]) / (2 * eps)


def along(grads: list[Tensor], direction: list[Tensor]) -> Tensor:
    return torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_those_of_the_formula(kind: str) -> None:
    weights, losses = WEIGHTS[kind], torch.rand(5, 2, dtype=torch.float64) + 0.1
    place = [(t + 1) / LENGTH for t in range(LENGTH)]
    raw = [p**weights.power * (p > weights.start) for p in place]
    mean = sum(raw) / LENGTH
    for t, row in enumerate(weights(losses)):
        for loss, found in zip(losses[t], row, strict=True):
            slope = 1 / loss.item() if weights.transform == "log" else 1.0
            assert found.item() == pytest.approx(raw[4 + t] / mean * slope, rel=1e-12)


def test_a_solved_task_does_not_blow_up_the_logarithm() -> None:
    weights = LossWeights("log", length=3)(torch.tensor([[0.0], [1e-9], [0.5]]))
    assert weights.flatten().tolist() == pytest.approx([1e3, 1e3, 2.0])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_meta_gradient_equals_finite_differences(kind: str) -> None:
    """Of the meta-loss itself, written out here: logarithms are taken, not linearised."""
    rule, weights = random_rule("lstm", torch.float64), WEIGHTS[kind]
    place = torch.arange(1, LENGTH + 1, dtype=torch.float64) / LENGTH
    raw = place**weights.power * (place > weights.start)
    raw = (raw / raw.mean())[4:10, None]

    def unroll() -> MetaGradient:
        # No warm-up: its steps would depend on the weights, and truncation ignores that.
        return estimate(rule, "full", 6, EstimatorOptions(weights=weights), warm_up=0)[0]

    def meta_loss() -> Tensor:
        losses = unroll().losses
        return (raw * (losses.log() if weights.transform == "log" else losses)).sum(0).mean()

    direction, expected = directional(rule, meta_loss)
    found = along(unroll().grads, direction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["lstm", "equivariant"])
def test_replay_weighs_as_autograd_does(name: str, kind: str) -> None:
    rule, options = random_rule(name, torch.float64), EstimatorOptions(weights=WEIGHTS[kind])
    reference, _ = estimate(rule, "autograd", 6, options)
    replayed, _ = estimate(rule, "replay", 6, options)
    plain, _ = estimate(rule, "replay", 6)
    assert any(
        not torch.allclose(a, b, rtol=1e-3)
        for a, b in zip(plain.grads, reference.grads, strict=True)
    )
    for a, b in zip(replayed.grads, reference.grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    torch.testing.assert_close(replayed.losses, plain.losses, rtol=0, atol=0)


@pytest.mark.parametrize("fitness", ["sum", "log-final"])
def test_losses_of_optimizees_of_different_structure_are_weighed(fitness: Fitness) -> None:
    """Each by its own: coordinates lie optimizee by optimizee where these are not stacked."""
    rule, weights = random_rule("lstm", torch.float64), WEIGHTS["all"]
    families = [build_tasks(name) for name in ("quadratic", "digits")]

    def found(estimator: str, options: EstimatorOptions) -> list[Tensor]:
        generators = [seeded("structure", i) for i in range(2)]
        pairs = zip(families, generators, strict=True)
        tasks = [family.sample(generator) for family, generator in pairs]
        optimizees = Optimizees(rule, tasks, generators, torch.float64, stacked=False)
        for _ in range(4):
            optimizees.advance(rule)
        return ESTIMATORS[estimator](rule, optimizees, 6, options).grads

    options = EstimatorOptions(weights=weights, fitness=fitness)
    plain = found("replay", EstimatorOptions(fitness=fitness))
    replayed, reference = found("replay", options), found("autograd", options)
    for a, b, c in zip(replayed, reference, plain, strict=True):
        assert (a - b).abs().max() <= 1e-7 * b.abs().max()
        assert (a - c).abs().max() > 1e-2 * b.abs().max()


def test_the_part_before_the_beginning_teaches_nothing() -> None:
    rule = random_rule("lstm", torch.float64)
    options = EstimatorOptions(weights=LossWeights(start=0.5, length=20))
    found, _ = estimate(rule, "replay", 6, options, warm_up=0)
    assert all(g.abs().max() == 0 for g in found.grads)


def test_recipes_say_which_weights() -> None:
    assert loss_weights(SMALL, 0, 10) is None
    recipe = replace(SMALL, loss_transform="log", loss_from=0.5, loss_power=2.0)
    assert loss_weights(recipe, 4, 10) == LossWeights("log", 0.5, 2.0, 4, 10)
    assert recipe_from_json(recipe.to_json()) == recipe
    for changes, message in (
        ({"loss_from": 1.0}, r"loss_from must lie in \[0, 1\), got 1.0"),
        ({"loss_power": -1.0}, "loss_power must be at least 0, got -1.0"),
        ({"loss_transform": "log", "relative_loss": True}, "choose one"),
        ({"imitation": -0.1}, "imitation must be at least 0"),
        ({"imitation_lr": 0.0}, "imitation_lr must be positive, got 0.0"),
        ({"rescale": -1.0}, "rescale must be at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_from_json({**SMALL.to_json(), **changes})


# ---- imitation


def test_what_is_imitated_is_adam() -> None:
    start = torch.randn(7, dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    adam, teacher = torch.optim.Adam([param], lr=0.02), Imitation(1.0, 0.02)
    rule = random_rule("lstm", torch.float64)
    _, optimizees = estimate(rule, "replay", 1)
    segments = type(optimizees.segments)([param.shape], dtype=torch.float64)
    for _ in range(4):
        before = param.detach().clone()
        param.grad = torch.randn(7, dtype=torch.float64)
        target = teacher.target(param.grad, before, segments)
        adam.step()
        torch.testing.assert_close(target, param.detach() - before, rtol=1e-9, atol=1e-12)


def test_imitation_gradient_equals_finite_differences() -> None:
    """Over one step, where the loss says nothing and the target is the same for all weights."""
    rule = random_rule("lstm", torch.float64)

    def options() -> EstimatorOptions:
        return EstimatorOptions(imitation=Imitation(0.7, 0.05))

    def distance() -> Tensor:
        family = build_tasks("quadratic")
        generators = [seeded("meta-loss", i) for i in range(2)]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, torch.float64)
        before = optimizees.packed.clone()
        record = optimizees.advance_recorded(rule)
        target = -0.05 * record.grad.sign()  # Adam's first step, up to its eps
        return 0.7 * ((optimizees.packed - before - target) / 0.05).square().mean()

    direction, expected = directional(rule, distance)
    for estimator in ("autograd", "replay"):
        found, _ = estimate(rule, estimator, 1, options(), warm_up=0)
        torch.testing.assert_close(along(found.grads, direction), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["lstm", "equivariant"])
def test_replay_imitates_as_autograd_does(name: str) -> None:
    """In the second unroll of a run, too, where Adam's moments go on."""
    rule = random_rule(name, torch.float64)

    def second(estimator: str) -> MetaGradient:
        options = EstimatorOptions(weights=WEIGHTS["log"], imitation=Imitation(0.5, 0.01))
        task = "quadratic" if name == "lstm" else "digits"
        _, optimizees = estimate(rule, estimator, 3, options, task)
        return ESTIMATORS[estimator](rule, optimizees, 4, options)

    reference, replayed = second("autograd"), second("replay")
    for a, b in zip(replayed.grads, reference.grads, strict=True):
        assert (a - b).abs().max() <= 1e-7 * b.abs().max()


def test_a_rule_learns_to_imitate(tmp_path: Path) -> None:
    recipe = replace(
        SMALL, imitation=10.0, imitation_lr=0.02, epochs=2, runs_per_epoch=30, meta_lr=0.03,
        meta_lr_final=None, tasks_per_meta_step=1, horizon=8, truncation=8, coordinates=None,
        validation_runs=2,
    )  # fmt: skip
    trainer = MetaTrainer(recipe, tmp_path)

    def distance() -> float:
        generators = [seeded("imitated", i) for i in range(8)]
        tasks = [trainer.family.sample(generator) for generator in generators]
        optimizees, teacher = Optimizees(trainer.rule, tasks, generators), Imitation(1.0, 0.02)
        total = 0.0
        for _ in range(8):
            before = optimizees.packed.clone()
            record = optimizees.advance_recorded(trainer.rule)
            target = teacher.target(record.grad, before, optimizees.segments)
            total += teacher.distance(optimizees.packed - before, target).item()
        return total

    before = distance()
    trainer.train()
    assert distance() < 0.5 * before


def test_imitation_ends_with_its_epochs() -> None:
    recipe = replace(SMALL, imitation=0.5, imitation_lr=0.1, imitation_epochs=2)
    assert imitation(recipe, 2) == Imitation(0.5, 0.1)
    assert imitation(recipe, 3) is None
    assert imitation(replace(recipe, imitation_epochs=None), 99) == Imitation(0.5, 0.1)
    assert imitation(SMALL, 1) is None


# ---- re-parametrisation


def small_task() -> ModuleTask:
    inputs = torch.randn(6, 3, generator=seeded("inputs"))
    return ModuleTask(
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)),
        lambda g: (inputs, torch.randint(2, (6,), generator=g)),
        tests=lambda: (inputs, torch.zeros(6, dtype=torch.long)),
    )


def test_rescaled_task_is_the_same_function_in_other_units() -> None:
    task = small_task()
    scaled = RescaledTask(task, 1.5, seeded("scales"))
    params, own = scaled.init(seeded(1)), task.init(seeded(1))
    for name, value in own.items():
        torch.testing.assert_close(params[name] * scaled.scales[name], value)
    batch, plain = scaled.batch(seeded(2)), task.batch(seeded(2))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    loss = scaled.loss(leaves, batch)
    torch.testing.assert_close(loss, task.loss(own, plain))
    originals = {name: p.requires_grad_() for name, p in own.items()}
    expected = torch.autograd.grad(task.loss(originals, plain), list(originals.values()))
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, a, b in zip(own, found, expected, strict=True):
        torch.testing.assert_close(a, b * scaled.scales[name])
    detached = {name: p.detach() for name, p in params.items()}
    assert scaled.test(detached) == pytest.approx(
        task.test({n: p.detach() for n, p in own.items()})
    )


def test_scales_are_log_uniform_and_differ_between_tensors() -> None:
    task, generator = small_task(), seeded("many")
    logs = torch.stack(
        [torch.stack(list(RescaledTask(task, 1.5, generator).scales.values())) for _ in range(100)]
    ).log()
    assert logs.shape == (100, 4)
    assert logs.abs().max() <= 1.5
    # Mean and standard deviation of U[-1.5, 1.5], within three standard errors of 400 draws.
    assert abs(logs.mean().item()) < 3 * (1.5 / math.sqrt(3)) / 20
    assert logs.std().item() == pytest.approx(1.5 / math.sqrt(3), rel=0.1)
    assert (logs.std(1) > 0).all()


def test_rescaled_tasks_side_by_side_keep_their_own_units() -> None:
    family = Rescaled(build_tasks("digits"), 2.0)
    rule = random_rule("lstm")
    assert family.stackable

    def run(indices: list[int]) -> Tensor:
        generators = [seeded("side", i) for i in indices]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators)
        return torch.stack([optimizees.advance(rule) for _ in range(4)], 1)

    together = run([0, 1])
    for index in (0, 1):
        torch.testing.assert_close(together[index], run([index])[0], rtol=1e-4, atol=1e-5)


def test_rescaled_tasks_keep_buffers_of_their_own() -> None:
    inputs = torch.randn(6, 3, generator=seeded("inputs"))
    task = ModuleTask(
        lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)),
        lambda g: (inputs * torch.rand((), generator=g), torch.arange(6) % 2),
        loss=lambda m, batch: m.eval()(batch[0]).square().mean() + m.train()(batch[0]).abs().mean(),
    )
    rule, family = random_rule("lstm"), Rescaled(FixedTask(task), 1.0)
    assert not family.stackable

    def run(indices: list[int]) -> Tensor:
        generators = [seeded("buffers", i) for i in indices]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, stacked=False)
        return torch.stack([optimizees.advance(rule) for _ in range(4)], 1)

    together = run([0, 1])
    for index in (0, 1):
        torch.testing.assert_close(together[index], run([index])[0], rtol=1e-5, atol=1e-6)


def test_training_is_rescaled_and_validation_is_not(tmp_path: Path) -> None:
    plain = MetaTrainer(SMALL, tmp_path / "plain")
    scaled = MetaTrainer(replace(SMALL, rescale=1.0), tmp_path / "scaled")
    assert scaled.validate() == plain.validate()
    assert scaled._train_run(1, 0)[0] != plain._train_run(1, 0)[0]
