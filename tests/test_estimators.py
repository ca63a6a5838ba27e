"""Meta-gradients: estimators against exact gradients, finite differences and each other."""

from typing import Any, Literal

import pytest
import torch
from conftest import random_rule
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    MetaGradient,
    ModuleTask,
    Optimizees,
    build_tasks,
)
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import Batch, Params, Task
from learned_optim.rules import (
    RuleConfig,
    Segments,
    State,
    StepContext,
    UpdateRule,
    rule_class,
    rule_names,
)
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
    **options: Any,
) -> tuple[MetaGradient, Optimizees]:
    family = build_tasks(task)
    generators = [seeded("estimators", i) for i in range(optimizees)]
    tasks = [family.sample(generator) for generator in generators]
    batch = Optimizees(rule, tasks, generators, rule.dtype)
    for _ in range(warm_up):
        batch.advance(rule)
    return ESTIMATORS[estimator](rule, batch, steps, EstimatorOptions(**options)), batch


@pytest.mark.parametrize("name", [*REPLAYED, "lstm that reads the loss"])
@pytest.mark.parametrize("task", ["quadratic", "digits"])
def test_replay_equals_autograd(name: str, task: str) -> None:
    """The same gradients to float64 precision, and the same optimizees afterwards."""
    reads_loss = LSTMRule(LSTMConfig(loss_input=True)).double()
    rule = random_rule(name, torch.float64) if name in REPLAYED else reads_loss
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
    single, _ = estimate(rule, "digits", "full", 4, optimizees=1)
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
    draws = []
    for seed in range(30):
        options = {"generator": Generator().manual_seed(seed), "sampling": sampling}
        found, _ = estimate(rule, task, "replay", 5, optimizees=2, coordinates=count, **options)
        draws.append(found.grads)
    for index, reference in enumerate(exact.grads):
        sample = torch.stack([d[index] for d in draws])
        error = (sample.mean(0) - reference).norm()
        spread = sample.std(0).norm() / 30**0.5
        assert error < 3 * spread + 1e-12
    assert not torch.allclose(draws[0][0], draws[1][0])


# ---- against gradients in plain code

RATES, UNROLLS, STEPS, BETA = (0.1, 0.1), 3, 3, 0.9
CURVATURES = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)


class Quadratic(Task):
    """The loss ``sum_i h_i theta_i^2 / 2``, from ones."""

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.ones_like(CURVATURES)}

    def batch(self, generator: Generator) -> Batch:
        return ()

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (0.5 * CURVATURES * params["theta"].square()).sum()


class TwoRates(UpdateRule):
    """``update = -(w_0 grad + w_1 momentum)``; ``momentum`` averages gradients with decay 0.9."""

    rows = "tensors"

    def __init__(self) -> None:
        super().__init__(RuleConfig())
        self.rates = nn.Parameter(torch.tensor(RATES, dtype=torch.float64))

    def init_state(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param).unsqueeze(-1)}

    def moments(self, grad: Tensor, state: State) -> State:
        return {"momentum": state["momentum"].lerp(grad.unsqueeze(-1), 1 - BETA)}

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, None]:
        return means.new_zeros(len(segments), 1), None

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[None, Tensor]:
        return None, -torch.cat([grad.unsqueeze(-1), state["momentum"]], 1)

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        return self.rates.expand(*features.shape[:2], 2), {}


def exact(unrolls: int = UNROLLS, steps: int = STEPS, first_order: bool = False) -> Tensor:
    """The gradient of a run's summed loss, truncated at the beginning of each unroll, ``(2,)``."""
    rates = torch.tensor(RATES, dtype=torch.float64, requires_grad=True)
    theta, momentum, total = torch.ones_like(CURVATURES), torch.zeros_like(CURVATURES), 0.0
    for _ in range(unrolls):
        theta, momentum = theta.detach(), momentum.detach()
        for _ in range(steps):
            total = total + (0.5 * CURVATURES * theta.square()).sum()
            grad = CURVATURES * theta
            grad = grad.detach() if first_order else grad
            momentum = BETA * momentum + (1 - BETA) * grad
            theta = theta - rates[0] * grad - rates[1] * momentum
    return torch.autograd.grad(total, rates)[0]


def run(
    name: str, unrolls: int = UNROLLS, steps: int = STEPS, seed: int = 0, **options: Any
) -> Tensor:
    """The estimate of a run's gradient, summed over its unrolls, ``(2,)``."""
    rule = TwoRates()
    optimizees = Optimizees(rule, [Quadratic()], [seeded("run")], torch.float64)
    given = EstimatorOptions(generator=seeded("perturbations", seed), **options)
    estimates = [ESTIMATORS[name](rule, optimizees, steps, given) for _ in range(unrolls)]
    return torch.stack([meta.grads[0] for meta in estimates]).sum(0)


@pytest.mark.parametrize(
    ("name", "unrolls"), [("autograd", 3), ("replay", 3), ("full", 3), ("full", 1)]
)
def test_backpropagation_is_exact(name: str, unrolls: int) -> None:
    found = run(name, unrolls, 12 // unrolls)
    target = exact(unrolls, 12 // unrolls, first_order=name != "full")
    torch.testing.assert_close(found, target, rtol=1e-11, atol=0)


def test_persistent_evolution_strategies_are_unbiased_for_the_whole_run() -> None:
    """The unrolls' own gradient is a third of it."""
    truncated, whole = exact(), exact(1, UNROLLS * STEPS)
    estimates = torch.stack([run("pes", seed=s, pairs=24, sigma=1e-3) for s in range(16)])
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - whole) / error).abs().max() < 4
    assert ((estimates.mean(0) - truncated) / error).abs().max() > 6


@pytest.mark.parametrize("rule", ["lstm", "horizon"])
def test_optimizees_go_on_under_the_weights_themselves(rule: str) -> None:
    """As under replay, to the bit: particles share no state with them, nor their batches."""
    learned = random_rule(rule)
    before = [weight.clone() for weight in learned.parameters()]
    options = EstimatorOptions(generator=Generator(), sigma=0.1)
    _, there = estimate(learned, "quadratic", "replay", 4)
    _, here = estimate(learned, "quadratic", "pes", 4, generator=Generator(), sigma=0.1)
    reference = ESTIMATORS["replay"](learned, there, 4, options)
    found = ESTIMATORS["pes"](learned, here, 4, options)
    assert torch.equal(found.losses, reference.losses)
    assert torch.equal(here.packed, there.packed)
    assert all(torch.equal(here.state[key], there.state[key]) for key in here.state)
    assert here.step == there.step == 8
    assert all(map(torch.equal, learned.parameters(), before))


def test_a_pair_shares_dropout_masks_and_no_buffers() -> None:
    """The first loss comes before the first update: its difference is zero unless masks differ."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # reads the buffers, too
        x, y = batch
        return F.mse_loss(model.train()(x), y) + F.mse_loss(model.eval()(x), y)

    layers = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
    task = ModuleTask(
        lambda: nn.Sequential(nn.Linear(8, 8), *layers),
        lambda g: (torch.randn(4, 8, generator=g), torch.ones(4, 1)),
        loss=loss,
    )
    rule, generator = random_rule("lstm"), seeded("dropout")
    found = []
    for name in ("replay", "pes"):
        optimizees = Optimizees(rule, [task], [generator.manual_seed(0)], stacked=False)
        options = EstimatorOptions(generator=Generator(), sigma=0.1)
        found += [ESTIMATORS[name](rule, optimizees, steps, options) for steps in (1, 1, 3)]
    assert all(not g.any() for g in found[3].grads)
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(found[:3], found[3:], strict=True))
