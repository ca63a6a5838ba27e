"""What the general-purpose rules promise by construction, with any weights and over any history."""

import pytest
import torch
from conftest import random_rule, trajectory

from learned_optim.rules.equivariant import EquivariantRule

SYMMETRIC = ["equivariant", "horizon"]


def history(seed: int, *shape: int) -> torch.Tensor:
    """Twelve gradients with a drift, so that momenta matter, ``(12, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drift + torch.randn(12, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("factor", [-1.0, 2.0**-20, 2.0**-3, 2.0**20])
def test_of_a_factor_on_the_loss_only_the_sign_matters(name: str, factor: float) -> None:
    rule, grads = random_rule(name, torch.float64), history(0, 4, 5)
    param = torch.zeros(4, 5, dtype=torch.float64) if factor < 0 else torch.ones(4, 5).double()
    plain, found = trajectory(rule, grads, param), trajectory(rule, factor * grads, param)
    if factor < 0:
        torch.testing.assert_close(found, -plain, rtol=1e-12, atol=1e-15)
    else:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-12)


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


def test_the_first_untrained_step_goes_downhill() -> None:
    """A fiftieth of the scale, 1 / sqrt(fan_in)."""
    rule, grads = EquivariantRule().double(), history(3, 5, 5)
    first = trajectory(rule, grads, torch.zeros(5, 5, dtype=torch.float64))[0]
    assert (first * grads[0] < 0).all()
    torch.testing.assert_close(first.abs().mean().item(), 0.02 * 5**-0.5, rtol=0.2, atol=0)
