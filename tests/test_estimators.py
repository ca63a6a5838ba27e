"""Meta-gradients: estimators against exact gradients, finite differences and each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import random_rule
from noisy_quadratic import ExactGradients, NoisyQuadratic, TwoRates, exact_gradients
from test_trainer import SMALL
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    MetaGradient,
    MetaTrainer,
    ModuleTask,
    Optimizees,
    build_tasks,
)
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import Params
from learned_optim.rules import UpdateRule, rule_class, rule_names
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

REPLAYED = [name for name in rule_names() if rule_class(name).rows != "none"]


def estimate(
    rule: UpdateRule,
    task: str,
    estimator: str,
    steps: int,
    *,
    warm_up: int = 0,
    optimizees: int = 3,
    coordinates: int | None = None,
    seed: int = 0,
    sampling: Literal["uniform", "stratified"] = "uniform",
    dtype: torch.dtype = torch.float64,
) -> tuple[MetaGradient, Optimizees]:
    family = build_tasks(task)
    generators = [seeded("estimators", i) for i in range(optimizees)]
    tasks = [family.sample(generator) for generator in generators]
    batch = Optimizees(rule, tasks, generators, dtype)
    for _ in range(warm_up):
        batch.advance(rule)
    options = EstimatorOptions(coordinates, torch.Generator().manual_seed(seed), sampling)
    return ESTIMATORS[estimator](rule, batch, steps, options), batch


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("task", ["quadratic", "digits"])
def test_replay_equals_autograd(name: str, task: str) -> None:
    """The same gradients to float64 precision, and the same optimizees afterwards."""
    rule = random_rule(name, torch.float64)
    kwargs = {"steps": 7, "warm_up": 5, "optimizees": 2}
    reference, there = estimate(rule, task, "autograd", **kwargs)
    replayed, here = estimate(rule, task, "replay", **kwargs)
    torch.testing.assert_close(replayed.losses, reference.losses, rtol=1e-12, atol=0)
    for weight, (a, b) in enumerate(zip(replayed.grads, reference.grads, strict=True)):
        scale = b.abs().max()
        # Sums over coordinates and steps cancel, so the last digits of a small total are lost.
        assert (a - b).abs().max() <= 1e-9 * scale, weight
    torch.testing.assert_close(here.packed, there.packed, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(here.state, there.state, rtol=1e-11, atol=1e-14)
    assert here.step == there.step == 12


def test_replay_with_the_loss_as_input() -> None:
    rule = LSTMRule(LSTMConfig(loss_input=True)).double()
    reference, _ = estimate(rule, "quadratic", "autograd", 6)
    replayed, _ = estimate(rule, "quadratic", "replay", 6)
    for a, b in zip(replayed.grads, reference.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize("name", REPLAYED)
def test_full_equals_finite_differences(name: str) -> None:
    rule = random_rule(name, torch.float64)
    weights = list(rule.parameters())
    result, _ = estimate(rule, "quadratic", "full", 5)
    direction = [torch.randn_like(w) for w in weights]
    expected = sum((g * d).sum() for g, d in zip(result.grads, direction, strict=True))
    eps, losses = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.add_(sign * eps * d)
        # The differences are taken on the in-place path: what is run is what is differentiated.
        losses.append(estimate(rule, "quadratic", "replay", 5)[0].losses.sum(0).mean())
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.sub_(sign * eps * d)
    difference = (losses[0] - losses[1]) / (2 * eps)
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", REPLAYED)
def test_full_in_float32_where_gradients_are_exactly_zero(name: str) -> None:
    """As of pixels that are always black: derivatives there must not overflow and meet a zero."""
    rule = random_rule(name)
    single, _ = estimate(rule, "digits", "full", 4, optimizees=1, dtype=torch.float32)
    exact, _ = estimate(rule.double(), "digits", "full", 4, optimizees=1)
    for a, b in zip(single.grads, exact.grads, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm(), name


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize(
    ("name", "task", "count"), [("lstm", "quadratic", 5), ("equivariant", "digits", 90)]
)
def test_sampled_coordinates_are_unbiased(
    name: str, task: str, count: int, sampling: Literal["uniform", "stratified"]
) -> None:
    """Averaged over draws, few coordinates give the gradient of all."""
    rule = random_rule(name, torch.float64)
    exact, _ = estimate(rule, task, "replay", 5, optimizees=2)
    draws = [
        estimate(
            rule, task, "replay", 5, optimizees=2, coordinates=count, seed=s, sampling=sampling
        )[0].grads
        for s in range(30)
    ]
    for index, reference in enumerate(exact.grads):
        sample = torch.stack([d[index] for d in draws])
        error = (sample.mean(0) - reference).norm()
        spread = sample.std(0).norm() / 30**0.5
        assert error < 3 * spread + 1e-12
    assert not torch.allclose(draws[0][0], draws[1][0])


def test_optimizees_do_not_see_each_other() -> None:
    """Side by side or alone: the same losses, and the mean of the meta-gradients."""
    rule = random_rule("lstm", torch.float64)
    family = build_tasks("digits")
    alone = []
    for i in range(3):
        generator = seeded("estimators", i)
        single = Optimizees(rule, [family.sample(generator)], [generator], torch.float64)
        alone.append(ESTIMATORS["replay"](rule, single, 4, EstimatorOptions()))
    together, _ = estimate(rule, "digits", "replay", 4)
    torch.testing.assert_close(together.losses, torch.cat([a.losses for a in alone], 1))
    for index, grad in enumerate(together.grads):
        mean = torch.stack([a.grads[index] for a in alone]).mean(0)
        torch.testing.assert_close(grad, mean, rtol=1e-9, atol=1e-12)


# ---- against a problem whose gradients are known

RATES, UNROLLS, STEPS = (0.1, 0.1), 3, 3
TASK = NoisyQuadratic(copies=100)
EXACT = exact_gradients(TASK, RATES, UNROLLS, STEPS)


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
    exact = exact_gradients(NoisyQuadratic(copies=1, noise=0.0), RATES, 3, 4)
    found = run(name, task=FromOnes(noise=0.0, copies=1), unrolls=unrolls, steps=12 // unrolls)
    torch.testing.assert_close(found, target(exact), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("name", "target", "other"),
    [
        ("es", EXACT.truncated, EXACT.whole),
        ("pes", EXACT.whole, EXACT.truncated),
    ],
)
def test_evolution_strategies_are_unbiased_for_their_own_target(
    name: str, target: Tensor, other: Tensor
) -> None:
    """The unrolls' gradient is a third of the whole run's, which only `pes` can see."""
    estimates = torch.stack([run(name, seed=s, pairs=24, sigma=1e-3) for s in range(16)])
    assert standard_errors(estimates, target) < 4
    assert standard_errors(estimates, other) > 6


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


def test_every_rank_needs_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="pairs=2 leave some of 3 ranks nothing to do"):
        MetaTrainer(replace(SMALL, estimator="es", pairs=2), tmp_path)
