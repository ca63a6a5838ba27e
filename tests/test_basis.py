"""Matrices in the eigenbasis of their gradients: steps against a plain account, and promises."""

import itertools
import math
from typing import Any

import pytest
import torch
from test_kernels import horizon_rule, needs_kernel
from torch import Tensor

from learned_optim.kernels import constants as c
from learned_optim.rules import Segments, State, StepContext, StepSettings
from learned_optim.rules import _basis as basis
from learned_optim.rules import _history as history
from learned_optim.rules.horizon import HorizonRule, rate_schedule

#: Shapes of which both sides are rotated, only the shorter one, and none.
SHAPES = [(8, 6), (3, 40), (40, 3), (4, 2, 2, 2), (5,), (8, 6), (1, 7)]
NUMBERS: dict[str, Any] = {"lr": 0.7, "weight_decay": 50.0, "total_steps": 80.0}


def eigenbasis_rule(dtype: torch.dtype = torch.float32) -> HorizonRule:
    rule = horizon_rule(dtype, config=1)
    assert rule.config.eigenbasis
    return rule


def fresh(rule: HorizonRule, params: list[Tensor]) -> list[State]:
    return [
        {"step": torch.zeros(()), **rule.init_state(p), **rule.init_matrices(p.shape, p.device)}
        for p in params
    ]


def problem(
    shapes: list[tuple[int, ...]], steps: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and gradients of correlated entries with a drift, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = [0.1 * draw(*shape) for shape in shapes]
    drifts = [draw(*shape) for shape in shapes]
    left = [draw(shape[0], shape[0]) for shape in shapes]
    grads = [
        [drift + torch.tensordot(mix, draw(*mix.shape[:1], *drift.shape[1:]), 1)
         for drift, mix in zip(drifts, left, strict=True)]
        for _ in range(steps)
    ]  # fmt: skip
    return params, grads


def run(
    rule: HorizonRule, params: list[Tensor], grads: list[list[Tensor]], **numbers: Any
) -> tuple[list[Tensor], list[State]]:
    params = [param.clone() for param in params]
    states = fresh(rule, params)
    for step in grads:
        raw = [g.to(p.dtype) for g, p in zip(step, params, strict=True)]
        rule.step_(params, raw, states, StepSettings(**numbers))
    return params, states


# ---- against a plain account


def without_rounding(turned: Tensor) -> Tensor:
    error = 4 * torch.finfo(turned.dtype).eps * turned.norm()
    return torch.where(turned.abs() < error, 0.0, turned)


def plain(
    rule: HorizonRule, param: Tensor, grads: list[Tensor], stagger: int, maximize: bool = False
) -> Tensor:
    """One tensor by the algorithm of the module's docstring, in the rule's dtype."""
    dtype, shape, lr = rule.dtype, param.shape, NUMBERS["lr"]
    matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (len(param), 1)
    sides = basis.rotated_sides(shape)
    covs = [torch.zeros(n, n, dtype=dtype) for n in matrix]
    turns = [torch.eye(n, dtype=dtype) for n in matrix]
    state = {key: value.reshape(-1, 1) for key, value in rule.init_state(param.to(dtype)).items()}
    state["stats"] = state["stats"].view(1, -1)
    segments = Segments([shape], dtype=dtype)
    for age, raw in enumerate(grads):
        grad = raw.to(param.dtype).to(dtype).reshape(matrix)
        share = max(1 - basis.COVARIANCE_BETA, 1 / (age + 1))
        if basis.refresh_is_near(age, stagger):
            covs = [(1 - share) * covs[0] + share * grad @ grad.T,
                    (1 - share) * covs[1] + share * grad.T @ grad]  # fmt: skip
        old = list(turns)
        if basis.refresh_is_due(age, stagger):
            for side in (side for side in range(2) if sides[side]):
                for _ in range(3 if age == 0 else 1):
                    mean = covs[side].diagonal().mean()
                    pushed = covs[side] @ turns[side] / mean + basis._SHIFT * turns[side]
                    q, r = torch.linalg.qr(pushed)
                    turns[side] = q * torch.where(r.diagonal() < 0, -1, 1)
            for key, bound in zip(("fast", "slow"), rule.momentum_bounds, strict=True):
                back = old[0] @ state[key].view(matrix) @ old[1].T
                state[key] = without_rounding(turns[0].T @ back @ turns[1]).reshape(-1, 1)
                state["square"] = state["square"].maximum((state[key] / bound).square())
        seen = (turns[0].T @ grad @ turns[1]) * (-1 if maximize else 1)
        seen = without_rounding(seen) if any(sides) else seen
        step = torch.tensor([float(age)], dtype=dtype)
        rotated = torch.tensor([float(any(sides))], dtype=dtype)
        context = StepContext(step, None, NUMBERS["total_steps"], rotated)
        shrink = rate_schedule(step, 80.0) ** 3 * state["stats"][:, history.CONFIDENCE].exp()
        wide = param.to(torch.promote_types(param.dtype, torch.float32)).reshape(matrix)
        wide = torch.where(seen != 0, wide * (1 - 1e-3 * lr * 50 * shrink), wide)
        flat = wide.reshape(-1).to(dtype)
        update, state = rule(seen.reshape(-1), state, flat, segments, context)
        moved = wide + lr * (turns[0] @ update.view(matrix) @ turns[1].T)
        param = moved.to(param.dtype).view(shape)
    return param


def test_steps_of_float64_are_those_of_a_plain_account() -> None:
    """Sides, kernels and vectors, also where covariances skip gradients."""
    rule = eigenbasis_rule(torch.float64)
    params, grads = problem(SHAPES, 110)
    found, states = run(rule, params, grads, maximize=True, **NUMBERS)
    assert ["basis_age" in state for state in states] == [True] * 4 + [False, True, False]
    for index, (param, moved) in enumerate(zip(params, found, strict=True)):
        own = [step[index] for step in grads]
        expected = plain(rule, param, own, index, maximize=True)
        torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-9)
        assert (moved - param).abs().max() > 0.01


@pytest.mark.usefixtures("either_form")
def test_steps_of_float32_are_those_of_a_plain_account() -> None:
    rule = eigenbasis_rule()
    shapes: list[tuple[int, ...]] = [(6, 6), (3, 40), (4, 2, 2, 2)]
    params, grads = problem(shapes, 30)
    params = [param.float() for param in params]
    found, _ = run(rule, params, grads, **NUMBERS)
    for index, (param, moved) in enumerate(zip(params, found, strict=True)):
        expected = plain(rule, param, [step[index] for step in grads], index)
        torch.testing.assert_close(moved, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_of_half_precision_is_that_of_float32_rounded_once(dtype: torch.dtype) -> None:
    rule = eigenbasis_rule()
    params, grads = problem([(8, 6), (40, 3), (2000,)], 2)
    half = [param.to(dtype) for param in params]
    grads = [[grad.to(dtype) for grad in step] for step in grads]
    found, states = run(rule, half, grads[:1], **NUMBERS)
    wide, own = run(rule, [param.float() for param in half], grads[:1], **NUMBERS)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, wide, strict=True))
    # A compiler may fuse the sums of one dtype otherwise than those of another.
    stats = [[state.pop("stats") for state in each] for each in (states, own)]
    torch.testing.assert_close(*stats, rtol=0, atol=1e-6)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(states, own, strict=True) for key in a)


# ---- one by one, bound, threads


def test_matrices_of_one_shape_step_as_they_do_alone() -> None:
    """One of them joins later; each alone has the stagger of its place."""
    rule = eigenbasis_rule()
    shapes: list[tuple[int, ...]] = [(8, 6)] * 3
    params, grads = problem(shapes, 20)
    alone = [param.clone().float() for param in params]
    together = [param.clone().float() for param in params]
    states, own = fresh(rule, together), fresh(rule, alone)
    for number, step in enumerate(grads):
        count = 3 if number >= 6 else 2
        raw = [grad.float() for grad in step[:count]]
        rule.step_(together[:count], raw, states[:count])
        for index in range(count):
            rotation = rule.rotation(alone[index : index + 1], own[index : index + 1], [index])
            seen, updates = rotation.rotate(raw[index : index + 1])
            rule.step_(rotation.wide, seen, own[index : index + 1], updates=updates)
            rotation.rotate_back()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_steps_have_the_same_bits(dtype: torch.dtype) -> None:
    """Also after somebody has written to bases, of matrices that lie apart in memory, too."""
    rule = eigenbasis_rule()
    start, grads = problem(SHAPES, 12)
    params, bound = ([param.to(dtype, copy=True) for param in start] for _ in range(2))
    states, own = fresh(rule, params), fresh(rule, bound)
    step_ = rule.bind(bound, own)
    for number, step in enumerate(grads):
        if number == 6:
            for state in (states[0], own[0], states[5], own[5]):
                state["row_basis"].neg_()
        raw = [grad.to(dtype) for grad in step]
        assert step_(raw, StepSettings(**NUMBERS))
        rule.step_(params, raw, states, StepSettings(**NUMBERS))
    assert all(map(torch.equal, bound, params))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(states, own, strict=True) for key in a)


# ---- promises


@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    # Powers of two round nothing; other factors do, and small directions amplify that.
    [(torch.float32, (2.0**-20, 2.0**20), 1e-4), (torch.float64, (1e-6, 1e6), 1e-2)],
)
def test_updates_are_odd_and_do_not_know_the_scale_of_the_loss(
    dtype: torch.dtype, factors: tuple[float, float], tolerance: float
) -> None:
    rule = eigenbasis_rule(dtype)
    params, grads = problem(SHAPES, 25)
    zeros = [torch.zeros_like(param, dtype=dtype) for param in params]

    def after(factor: float) -> Tensor:
        scaled = [[factor * grad for grad in step] for step in grads]
        return torch.cat([p.flatten() for p in run(rule, zeros, scaled, total_steps=80.0)[0]])

    plain = after(1.0)
    largest = plain.abs().max().item()
    assert torch.equal(after(-1.0), -plain)
    for factor in factors:
        torch.testing.assert_close(after(factor), plain, rtol=tolerance, atol=tolerance * largest)


def test_zero_history_gives_exactly_zero_update() -> None:
    rule = eigenbasis_rule()
    params, grads = problem(SHAPES, 8)
    params = [param.float() for param in params]
    silent = [[torch.zeros_like(grad) for grad in step] for step in grads]
    found, states = run(rule, params, silent, **NUMBERS)
    assert all(map(torch.equal, found, params))
    assert torch.equal(states[0]["row_basis"], torch.eye(8))
    # A matrix of which all but a row is silent has updates that are finite.
    some = [[grad * (torch.arange(len(grad)) == 0).view(-1, *[1] * (grad.dim() - 1))
             for grad in step] for step in grads]  # fmt: skip
    assert all(param.isfinite().all() for param in run(rule, params, some)[0])


@pytest.mark.parametrize("rounded", [False, True])
def test_directions_without_a_gradient_are_not_stepped_by_rounding_errors(
    rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients have one direction of the rows; so have updates, after refreshes too."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda device: rounded)
    monkeypatch.setattr(basis, "FEWEST_ROUNDED", 0)
    rule, row, params = eigenbasis_rule(), torch.randn(32, 1), [torch.randn(32, 12)]
    row /= row.norm()
    states = fresh(rule, params)
    for _ in range(25):
        before = params[0].clone()
        rule.step_(params, [row @ torch.randn(1, 12)], states)
        moved = params[0] - before
        inside = row @ (row.T @ moved)
        assert (moved - inside).norm() < 0.05 * inside.norm()


@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("total", [None, 30])
@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_no_step_is_longer_than_the_stated_bound(
    spread: float, total: int | None, config: int
) -> None:
    """Whatever the weights and the gradients: bursts after silence, ten decades, one-sided."""
    rule = horizon_rule(config=config)
    for weight in rule.parameters():
        weight.mul_(3.0)
    params, grads = problem([(8, 6), (3, 40)], 60)
    params = [param.float() for param in params]
    states = fresh(rule, params)
    for step in grads:
        size = math.exp(spread * torch.randn(()).item())
        size *= torch.rand(()).item() > 0.3
        before = [param.clone() for param in params]
        raw = [size * (grad if config else grad.clamp(min=0.0)).float() for grad in step]
        rule.step_(params, raw, states, StepSettings(total_steps=total))
        for param, old in zip(params, before, strict=True):
            moved = param - old  # a rotation keeps the norm alone
            longest = moved.square().mean().sqrt() if config else moved.abs().max()
            assert longest <= rule.longest_step * c.LARGEST_SCALE * (1 + 1e-4)
        for state in states:
            r = state["square"].sqrt() * (1 + 1e-3) + 1e-20
            assert (state["fast"].abs() <= rule.momentum_bounds[0] * r).all()
            assert (state["slow"].abs() <= rule.momentum_bounds[1] * r).all()


# ---- sides, refreshes, bases


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((64, 64, 3, 3), (True, True)), ((512, 512, 3, 3), (True, False)),
        ((64, 3, 7, 7), (True, True)), ((16, 8, 3, 3), (True, True)), ((128, 64), (True, True)),
        ((3072, 768), (False, True)), ((768, 3072), (True, False)), ((768, 768), (True, True)),
        ((50257, 768), (False, True)), ((20, 784), (True, False)), ((10, 20), (True, True)),
        ((4096, 4096), (False, False)), ((7,), (False, False)), ((), (False, False)),
        ((7, 1), (False, False)), ((1, 7), (False, False)), ((0, 3), (False, False)),
    ],
)  # fmt: skip
def test_rotated_sides(shape: tuple[int, ...], sides: tuple[bool, bool]) -> None:
    assert basis.rotated_sides(shape) == sides
    rule = eigenbasis_rule()
    state = rule.init_matrices(torch.Size(shape), torch.device("meta"))
    assert ("row_basis" in state, "col_basis" in state) == sides
    assert ("basis_age" in state) == any(sides)


def test_refreshes_come_within_their_period_and_are_spread() -> None:
    for stagger in range(70):
        due = [age for age in range(2000) if basis.refresh_is_due(age, stagger)]
        assert due[:6] == list(range(6))
        for last, now in itertools.pairwise(due):
            assert now - last <= basis.refresh_period(now) <= basis.LONGEST_PERIOD
    for age in range(200, 300):
        assert sum(basis.refresh_is_due(age, stagger) for stagger in range(64)) == 2
        assert sum(basis.refresh_is_near(age, stagger) for stagger in range(64)) == 2 * basis.WINDOW


@pytest.mark.parametrize("fast", [True, False])
def test_large_products_are_rounded_where_that_is_faster(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates to a hundredth; rotated gradients and covariances to float32's precision."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda device: fast)
    monkeypatch.setattr(basis, "FEWEST_ROUNDED", 32**3)
    x, mixed = torch.randn(2, 2, 32, 32)
    rows = torch.linalg.qr(mixed)[0]
    wide = x.double()
    back = basis.rotate_back(x, rows, rows, basis.rounded_product).double()
    expected = rows.double() @ wide @ rows.double().mT
    error = (back - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 1e-2 if fast else error < 1e-6
    cov = torch.zeros(2, 32, 32)
    basis.accumulate_(cov, x, [0, 0])
    torch.testing.assert_close(cov.double(), wide @ wide.mT, rtol=1e-5, atol=1e-5)
    turned = basis.rotate_grad(x, rows, None).double()
    torch.testing.assert_close(turned, rows.double().mT @ wide, rtol=1e-5, atol=1e-5)


def test_bases_stay_orthogonal_and_find_the_eigenvectors() -> None:
    vectors, _ = torch.linalg.qr(torch.randn(12, 12))
    cov = ((vectors * 0.6 ** torch.arange(12)) @ vectors.T).unsqueeze(0)
    found = torch.eye(12).unsqueeze(0)
    for _ in range(200):
        found = basis.next_basis(found, cov)
        torch.testing.assert_close(found[0].T @ found[0], torch.eye(12), rtol=0, atol=1e-5)
    torch.testing.assert_close((found[0].T @ vectors).abs(), torch.eye(12), rtol=0, atol=2e-3)
    # What has converged does not change, nor turn its sign.
    torch.testing.assert_close(basis.next_basis(found, cov), found, rtol=0, atol=1e-4)
