"""Meta-gradients: the estimators against each other and against finite differences."""

from typing import Literal

import pytest
import torch
from conftest import random_rule

from learned_optim.meta import ESTIMATORS, EstimatorOptions, MetaGradient, Optimizees, build_tasks
from learned_optim.meta.estimators import _sample_coordinates
from learned_optim.meta.seeding import seeded
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


def test_truncated_equals_full_where_nothing_is_truncated() -> None:
    """Over two steps only the first update counts, and no gradient of it reaches a gradient."""
    rule = random_rule("lstm", torch.float64)
    full, _ = estimate(rule, "quadratic", "full", 2)
    first_order, _ = estimate(rule, "quadratic", "autograd", 2)
    for a, b in zip(first_order.grads, full.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    full, _ = estimate(rule, "quadratic", "full", 3)
    first_order, _ = estimate(rule, "quadratic", "autograd", 3)
    assert any(not torch.allclose(a, b) for a, b in zip(first_order.grads, full.grads, strict=True))


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize(
    ("name", "task", "count"), [("lstm", "quadratic", 5), ("lstm", "digits", 90),
                                ("equivariant", "digits", 90)]
)  # fmt: skip
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
        for s in range(60)
    ]
    for index, reference in enumerate(exact.grads):
        sample = torch.stack([d[index] for d in draws])
        error = (sample.mean(0) - reference).norm()
        spread = sample.std(0).norm() / 60**0.5
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


def test_replay_needs_a_learned_rule() -> None:
    with pytest.raises(TypeError, match="splits into observation and response, and AdamRule has"):
        estimate(random_rule("adam"), "quadratic", "replay", 2)


@pytest.mark.parametrize("name", ["lstm", "equivariant"])
def test_stratified_sample_meets_every_tensor(name: str) -> None:
    """digits has tensors of 1,280, 20, 200 and 10: 500 of two optimizees are
    110, 20, 110 and 10 of each.

    """
    rule = random_rule(name, torch.float64)
    _, optimizees = estimate(rule, "digits", "replay", 1, optimizees=2)
    sizes = optimizees.segments.sizes
    assert sorted(sizes) == sorted(2 * [1280, 20, 200, 10])
    options = EstimatorOptions(500, torch.Generator(), "stratified")
    chosen, weights = _sample_coordinates(sizes, options)
    assert sorted(weights.tolist()) == sorted([1.0] * 60 + [200 / 110] * 220 + [1280 / 110] * 220)
    assert len(chosen.unique()) == len(chosen) == len(weights)
    assert int(chosen.max()) < sum(sizes)


def test_stratified_sample_of_fewer_coordinates_than_tensors() -> None:
    options = EstimatorOptions(2, torch.Generator(), "stratified")
    chosen, weights = _sample_coordinates([3, 4, 0, 5], options)
    assert torch.bucketize(chosen, torch.tensor([3, 7, 12]), right=True).tolist() == [0, 1, 2]
    assert weights.tolist() == [3.0, 4.0, 5.0]
