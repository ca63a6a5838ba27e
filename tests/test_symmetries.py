"""What the general-purpose rules promise by construction, with any weights and over any history."""

import math

import pytest
import torch
from conftest import context, pack, random_rule, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_optim.rules import Segments, UpdateRule, build_rule
from learned_optim.rules.steered import SteeredConfig, SteeredRule

SYMMETRIC = ["equivariant", "steered", "horizon"]


def history(seed: int, *shape: int) -> torch.Tensor:
    """Twelve gradients with a drift, so that momenta matter, ``(12, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drift + torch.randn(12, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_updates_are_odd_in_the_history(name: str, seed: int) -> None:
    rule, grads = random_rule(name, torch.float64), history(seed, 4, 5)
    param = torch.zeros(4, 5, dtype=torch.float64)
    forth, back = trajectory(rule, grads, param), trajectory(rule, -grads, param)
    torch.testing.assert_close(back, -forth, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_the_scale_of_the_loss_does_not_matter(name: str, seed: int, exponent: int) -> None:
    rule, grads = random_rule(name, torch.float64), history(seed, 4, 5)
    param = torch.ones(4, 5, dtype=torch.float64)
    plain = trajectory(rule, grads, param)
    scaled = trajectory(rule, grads * 2.0**exponent, param)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_zero_coordinate_stays_where_it_is(name: str) -> None:
    """A pixel that is always black moves no weight, whatever its neighbours do."""
    rule, grads = random_rule(name, torch.float64), history(0, 6, 3)
    grads[:, :, 1] = 0.0
    updates = trajectory(rule, grads, torch.ones(6, 3, dtype=torch.float64))
    assert torch.count_nonzero(updates[:, :, 1]) == 0
    assert torch.count_nonzero(updates[:, :, 0]) > 0


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_and_shape_count_only_through_the_statistics(name: str) -> None:
    """Permuting rows, or the inputs of a filter, permutes the updates; nothing else knows them."""
    rule, grads = random_rule(name, torch.float64), history(1, 6, 8)
    param = history(2, 6, 8)[0]
    whole = trajectory(rule, grads, param)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    shuffled = trajectory(rule, grads[:, order], param[order])
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-10, atol=1e-14)
    # A filter of the same fan-in and values is the same tensor to the rule.
    filters = trajectory(rule, grads.view(12, 6, 2, 2, 2), param.view(6, 2, 2, 2))
    torch.testing.assert_close(filters.view_as(whole), whole, rtol=1e-10, atol=1e-14)


# A fiftieth of the scale, 1 / sqrt(fan_in); or the first tenth of a warm-up to a tenth of 0.025.
FIRST_STEP = {"equivariant": 0.02 * 5**-0.5, "steered": 0.02 * 5**-0.5, "horizon": 0.1 * 0.025 / 10}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_first_untrained_step_goes_downhill(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule: UpdateRule = build_rule(name, {}).double()
    grads = history(3, 5, 5)
    first = trajectory(rule, grads, torch.zeros(5, 5, dtype=torch.float64))[0]
    assert (first * grads[0] < 0).all()
    torch.testing.assert_close(first.abs().mean().item(), FIRST_STEP[name], rtol=0.2, atol=0)


def test_steered_by_hand() -> None:
    """Two steps of one coordinate with a readout of constants: the formula in its docstring."""
    rule = SteeredRule(SteeredConfig(initial_step=0.5)).double()
    with torch.no_grad():
        rule.readout.weight.zero_()
        rule.readout.bias.copy_(torch.tensor([0.3, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    b = [1.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    step = 0.5 * math.exp(5 * math.tanh(0.3 / 2.5))
    g1, g2 = 2.0, -1.0
    f = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    s = (0.99 * 0.01 * g1 + 0.01 * g2) / (1 - 0.99**2)
    r = ((0.99 * 0.01 * g1**2 + 0.01 * g2**2) / (1 - 0.99**2)) ** 0.5
    scale = 3.0  # the parameter's own size; R = r in a tensor of one coordinate
    signals = [f / r, s / r, g2 / r, f / r, s / r, f / r * abs(s / r)]
    expected = -scale * step * sum(x * y for x, y in zip(b, signals, strict=True))
    param = torch.full((1, 1), 3.0, dtype=torch.float64)
    # The formula leaves the parameter where it is between the steps.
    segments, state = (
        Segments([param.shape], dtype=param.dtype),
        pack(rule, [rule.init_state(param)]),
    )
    for step, grad in enumerate((g1, g2)):
        given = torch.full((1,), grad, dtype=torch.float64)
        update, new = rule(given, state, param.view(-1), segments, context(rule, step))
        state = {**state, **new}
    assert update.item() == pytest.approx(expected, rel=1e-6)
