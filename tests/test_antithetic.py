"""Evolution strategies on unrolls: against exact gradients, backpropagation and themselves."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import random_rule
from noisy_quadratic import ExactGradients, NoisyQuadratic, TwoRates, exact_gradients
from test_trainer import stop_at
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    MetaGradient,
    MetaTrainer,
    ModuleTask,
    Optimizees,
    Recipe,
    antithetic,
    build_tasks,
)
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import Params
from learned_optim.rules import UpdateRule
from learned_optim.rules.lstm import LSTMConfig

RATES, UNROLLS, STEPS, SIGMA = (0.1, 0.1), 3, 3, 0.03
TASK = NoisyQuadratic(copies=100)
EXACT = exact_gradients(TASK, RATES, UNROLLS, STEPS, SIGMA)

DETERMINISTIC = NoisyQuadratic(copies=1, noise=0.0)


@dataclass(frozen=True)
class FromOnes(NoisyQuadratic):
    """One run of it is the expectation over runs from a normal start, for want of noise."""

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.ones(1, len(self.curvatures), dtype=torch.float64)}


def run(
    name: str,
    *,
    task: NoisyQuadratic = TASK,
    unrolls: int = UNROLLS,
    steps: int = STEPS,
    rates: tuple[float, float] = RATES,
    seed: int = 0,
    **options: object,
) -> Tensor:
    """The estimate of a run's gradient per copy, summed over its unrolls, ``(2,)``."""
    rule = TwoRates(rates)
    optimizees = Optimizees(rule, [task], [seeded("run", seed)], torch.float64)
    given = EstimatorOptions(generator=seeded("perturbations", seed), **options)  # type: ignore[arg-type]
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(unrolls):
        total += ESTIMATORS[name](rule, optimizees, steps, given).grads[0]
    return total / task.copies


def standard_errors(estimates: Tensor, target: Tensor) -> float:
    """By how many standard errors of the mean a coordinate is off its target at most."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return ((estimates.mean(0) - target) / error).abs().max().item()


# ---- against a problem whose gradients are known


@pytest.mark.parametrize(
    ("name", "unrolls", "target"),
    [
        ("autograd", 3, lambda exact: exact.first_order),
        ("replay", 3, lambda exact: exact.first_order),
        ("full", 3, lambda exact: exact.truncated),
        ("full", 1, lambda exact: exact.whole),
    ],
)
def test_backpropagation_is_exact(
    name: str, unrolls: int, target: Callable[[ExactGradients], Tensor]
) -> None:
    """Without noise one run has the expected gradient, to the digits of float64."""
    exact = exact_gradients(DETERMINISTIC, RATES, 3, 4, 0.0)
    found = run(name, task=FromOnes(noise=0.0, copies=1), unrolls=unrolls, steps=12 // unrolls)
    torch.testing.assert_close(found, target(exact), rtol=1e-11, atol=0)


def test_smoothed_gradients_are_means_of_exact_ones() -> None:
    """Of one unroll: the quadrature against a plain sum over a fine grid of weights."""
    exact = exact_gradients(DETERMINISTIC, RATES, 1, 4, 0.1)
    grid = torch.linspace(-5.25, 5.25, 15, dtype=torch.float64)
    density = torch.exp(-0.5 * grid**2)
    density /= density.sum()
    mean = torch.zeros(2, dtype=torch.float64)
    for (x, p), (y, q) in itertools.product(zip(grid.tolist(), density, strict=True), repeat=2):
        if p * q > 1e-10:
            here = (RATES[0] + 0.1 * x, RATES[1] + 0.1 * y)
            mean += p * q * exact_gradients(DETERMINISTIC, here, 1, 4, 0.0).truncated
    torch.testing.assert_close(exact.smoothed_truncated, mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.smoothed_whole, mean, rtol=1e-5, atol=0)
    assert (exact.truncated - mean).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "unrolls", "target", "other"),
    [
        ("autograd", UNROLLS, EXACT.first_order, EXACT.whole),
        ("full", UNROLLS, EXACT.truncated, EXACT.whole),
        ("full", 1, EXACT.whole, EXACT.truncated),
        ("es", UNROLLS, EXACT.smoothed_truncated, EXACT.smoothed_whole),
        ("pes", UNROLLS, EXACT.smoothed_whole, EXACT.smoothed_truncated),
    ],
)
def test_estimators_are_unbiased_for_their_own_target(
    name: str, unrolls: int, target: Tensor, other: Tensor
) -> None:
    """The unrolls' gradient is a third of the whole run's: only `full` and `pes` can see that."""
    estimates = torch.stack([
        run(name, unrolls=unrolls, steps=UNROLLS * STEPS // unrolls, seed=s, pairs=24, sigma=SIGMA)
        for s in range(16)
    ])  # fmt: skip
    assert standard_errors(estimates, target) < 4
    assert standard_errors(estimates, other) > 6


def test_small_perturbations_along_every_weight_give_backpropagation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Perturbed one by one, the weights' differences are central differences of the loss."""
    rule = random_rule("horizon", torch.float64)
    count = sum(p.numel() for p in rule.parameters())
    monkeypatch.setattr(
        antithetic,
        "_perturbations",
        lambda rule, options: count**0.5 * torch.eye(count, dtype=torch.float64)[::9],
    )
    pairs = len(range(0, count, 9))
    options = EstimatorOptions(sigma=1e-6, pairs=pairs)
    full, _ = on_quadratic(rule, "full", options, steps=3)
    found, _ = on_quadratic(rule, "es", options, steps=3)
    expected = torch.cat([g.flatten() for g in full.grads])
    actual = torch.cat([g.flatten() for g in found.grads]) * pairs / count
    torch.testing.assert_close(actual[::9], expected[::9], rtol=1e-4, atol=1e-8)
    assert expected[::9].abs().max() > 1e-3


def on_quadratic(
    rule: UpdateRule, name: str, options: EstimatorOptions, steps: int = 4, unrolls: int = 1
) -> tuple[MetaGradient, Optimizees]:
    family = build_tasks("quadratic")
    generators = [seeded("antithetic", i) for i in range(3)]
    tasks = [family.sample(generator) for generator in generators]
    optimizees = Optimizees(rule, tasks, generators, rule.dtype)
    for _ in range(unrolls):
        meta = ESTIMATORS[name](rule, optimizees, steps, options)
    return meta, optimizees


# ---- what holds of every estimate


@pytest.mark.parametrize("name", ["es", "pes"])
def test_opposite_perturbations_give_the_same_estimate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = run(name, pairs=3)
    draw = antithetic._perturbations
    monkeypatch.setattr(antithetic, "_perturbations", lambda *given: -draw(*given))
    assert torch.equal(run(name, pairs=3), there)


@pytest.mark.parametrize("name", ["es", "pes"])
def test_estimates_follow_the_seed(name: str) -> None:
    assert torch.equal(run(name, seed=1), run(name, seed=1))
    assert not torch.allclose(run(name, seed=1), run(name, seed=2), rtol=0.01)


@pytest.mark.parametrize("name", ["es", "pes"])
@pytest.mark.parametrize("rule", ["lstm", "horizon"])
def test_optimizees_go_on_under_the_weights_themselves(name: str, rule: str) -> None:
    """As under replay, to the bit: particles share no state with them, nor their batches."""
    learned = random_rule(rule)
    before = [weight.clone() for weight in learned.parameters()]
    reference, there = on_quadratic(learned, "replay", EstimatorOptions(), unrolls=2)
    options = EstimatorOptions(generator=Generator(), sigma=0.1)
    found, here = on_quadratic(learned, name, options, unrolls=2)
    assert torch.equal(found.losses, reference.losses)
    assert torch.equal(here.packed, there.packed)
    assert all(torch.equal(here.state[key], there.state[key]) for key in here.state)
    assert here.step == there.step == 8
    for weight, old in zip(learned.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_particles_begin_anew_with_every_run() -> None:
    """The first unroll of a run is that of plain evolution strategies."""
    rule = random_rule("lstm", torch.float64)
    first = {}
    for name in ("es", "pes"):
        options = EstimatorOptions(generator=Generator().manual_seed(3))
        first[name], optimizees = on_quadratic(rule, name, options)
        assert (optimizees.carry is None) == (name == "es")
    for a, b in zip(first["es"].grads, first["pes"].grads, strict=True):
        assert torch.equal(a, b)


def test_pairs_may_not_change_within_a_run() -> None:
    rule = random_rule("lstm")
    _, optimizees = on_quadratic(rule, "pes", EstimatorOptions(pairs=2))
    with pytest.raises(ValueError, match=r"pairs=3 on rank 0 of 1 do not continue the 2 pairs"):
        ESTIMATORS["pes"](rule, optimizees, 2, EstimatorOptions(pairs=3))


def test_a_pair_sees_one_dropout() -> None:
    """The first loss comes before the first update: its difference is zero unless masks differ."""
    task = ModuleTask(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
        lambda g: (torch.randn(4, 8, generator=g), torch.ones(4, 1)),
        nn.functional.mse_loss,
    )
    rule, generator = random_rule("lstm"), seeded("dropout")
    found = []
    for name in ("replay", "es"):
        optimizees = Optimizees(rule, [task], [generator.manual_seed(0)])
        with global_generator_seeded("dropout"):
            options = EstimatorOptions(generator=Generator())
            found += [ESTIMATORS[name](rule, optimizees, steps, options) for steps in (1, 1, 3)]
    assert all(not g.any() for meta in found[3:5] for g in meta.grads)
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(found[:3], found[3:], strict=True))


# ---- several ranks


def test_ranks_share_pairs_and_exchange_fitness_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks in turns: what they would send adds up to what one rank computes, to the bit."""
    rule = random_rule("lstm")
    count = sum(p.numel() for p in rule.parameters())
    sent: list[list[Tensor]] = [[], []]

    def unrolls(name: str, rank: int, world: int) -> MetaGradient:
        options = EstimatorOptions(
            generator=Generator().manual_seed(5), pairs=3, rank=rank, world=world
        )
        return on_quadratic(rule, name, options, unrolls=3)[0]

    for name in ("es", "pes"):
        alone = unrolls(name, 0, 1)
        for rank in (0, 1):
            sent[rank].clear()
            monkeypatch.setattr(
                antithetic.dist, "all_reduce", lambda x, rank=rank: sent[rank].append(x.clone())
            )
            unrolls(name, rank, 2)
        totals = iter([a + b for a, b in zip(*sent, strict=True)])
        monkeypatch.setattr(
            antithetic.dist, "all_reduce", lambda x, totals=totals: x.copy_(next(totals))
        )
        together = unrolls(name, 1, 2)
        assert torch.equal(together.losses, alone.losses)
        for a, b in zip(together.grads, alone.grads, strict=True):
            assert torch.equal(a, b)
        # Four steps' losses of three optimizees, and the fitness of two runs per pair.
        assert [x.numel() for x in sent[0]] == [4 * 3 + 3 * 2 * 3] * 3
        assert count > 1000


def test_ranks_need_a_common_seed() -> None:
    with pytest.raises(ValueError, match="the same on all ranks: give a generator"):
        on_quadratic(random_rule("lstm"), "es", EstimatorOptions(world=2))


# ---- in the meta-trainer


SMALL = Recipe(
    task="quadratic",
    rule=LSTMConfig(preprocessing="raw", output_scale=1.0, hidden_size=4, num_layers=1),
    epochs=2, meta_lr=0.01, runs_per_epoch=2, tasks_per_meta_step=2, horizon=6, truncation=2,
    pairs=2, sigma=0.05, validation_runs=2, test_runs=2,
)  # fmt: skip


@pytest.mark.parametrize("name", ["es", "pes"])
def test_interrupted_training_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, after the particles of a run were lost."""
    recipe = replace(SMALL, estimator=name)
    whole = MetaTrainer(recipe, tmp_path / "whole")
    start = [weight.clone() for weight in whole.rule.parameters()]
    whole.train()

    stop_at(MetaTrainer(recipe, tmp_path / "parts"), 3)
    resumed = MetaTrainer(recipe, tmp_path / "parts")
    assert resumed.round == 1
    resumed.train()
    for a, b, old in zip(resumed.rule.parameters(), whole.rule.parameters(), start, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, old)


def test_persistent_particles_go_through_the_trainers_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three unrolls per run: perturbations add up within it, and begin anew with the next."""
    norms = []
    estimate = antithetic._estimate

    def watched(*given: object) -> MetaGradient:
        norms.append(given[-1].directions.square().mean().item())  # type: ignore[attr-defined]
        return estimate(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(antithetic, "_estimate", watched)
    MetaTrainer(replace(SMALL, epochs=1, estimator="pes", pairs=8), tmp_path).train()
    assert norms == pytest.approx([1, 2, 3, 1, 2, 3], rel=0.15)


def test_evolution_strategies_train_without_derivatives_of_the_loss(tmp_path: Path) -> None:
    recipe = replace(
        SMALL, epochs=1, runs_per_epoch=25, estimator="pes", pairs=4,
        meta_lr=0.03, validation_runs=32,
    )  # fmt: skip
    trainer = MetaTrainer(recipe, tmp_path)
    before = trainer.validate()
    trainer.train()
    assert trainer.history[0].validation < 0.9 * before


def test_copies_of_optimizees_with_buffers_and_dropout_are_apart() -> None:
    """In turns on the same batches, two copies have the losses that one alone has."""
    layers = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    inputs = torch.randn(32, 3, generator=seeded("inputs"))

    def batch(generator: Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(32, (8,), generator=generator)
        return inputs[index], (inputs[index, 0] > 0).long()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # reads the buffers, too
        x, y = batch
        return F.cross_entropy(model.train()(x), y) + F.cross_entropy(model.eval()(x), y)

    task = ModuleTask(lambda: nn.Sequential(nn.Linear(3, 4), *layers), batch, loss=loss)
    rule, other = random_rule("lstm"), random_rule("lstm")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)

    def losses(together: bool) -> Tensor:
        optimizees = Optimizees(rule, [task, task], [seeded(1), seeded(2)], stacked=False)
        optimizees.advance(rule)
        twin, found = optimizees.copy(), []
        for _ in range(4):
            batches = optimizees.next_batch()
            if together:
                twin.advance(other, batches)
            found.append(optimizees.advance(rule, batches))
        if together:
            last = optimizees.next_batch()
            own = optimizees.losses(optimizees.packed, last)
            assert not torch.equal(twin.losses(twin.packed, last), own)
        return torch.stack(found)

    assert torch.equal(losses(together=True), losses(together=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "pes", "unrolls_per_run": 2}, "leave out unrolls_per_run=2"),
        ({"estimator": "pes", "pairs": 0}, "pairs must be at least 1, got 0"),
        ({"estimator": "es", "sigma": 0.0}, "sigma must be positive, got 0.0"),
    ],
)  # fmt: skip
def test_recipes_of_evolution_strategies_are_checked(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_every_rank_needs_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="pairs=2 leave some of 3 ranks nothing to do"):
        MetaTrainer(replace(SMALL, estimator="es"), tmp_path)
