"""Bad gradients, and drawn shapes, strides, dtypes, groups and missing gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

from .common import ALL_RULES, flat, make_rule, small_net, step_with, train


def finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(torch.view_as_real(tensor) if tensor.is_complex() else tensor).all())


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_bad_entry_counts_as_zero(rule: UpdateRule, bad: float) -> None:
    """Only that coordinate hears of it, and it hears a zero."""
    results = []
    for value in (bad, 0.0):
        param = Parameter(torch.ones(3, 4))
        opt = LearnedOptimizer([param], rule)
        for step in range(4):
            grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            if step == 1:
                grad[1, 2] = value
            step_with(opt, grad)
        results.append((param.detach(), opt.state[param]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_training_stays_finite_after_a_batch_of_huge_gradients(descending: UpdateRule) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending, weight_decay=0.1)
    train(model, opt, 5)
    step_with(opt, *(torch.full_like(p, 3e38) for p in model.parameters()))
    train(model, opt, 30)
    assert finite(flat(model))
    assert all(finite(v) for state in opt.state.values() for v in state.values())


def test_finite_gradients_beyond_float32_do_not_count_as_infinite(rule: UpdateRule) -> None:
    """1e300 in float64 is a large gradient, not a missing one; both signs keep their meaning."""
    updates = []
    for value in (1e300, 2.0**48, -1e300):
        param = Parameter(torch.zeros(2, dtype=torch.float64))
        opt = LearnedOptimizer([param], rule)
        step_with(opt, torch.full((2,), value, dtype=torch.float64))
        assert finite(param)
        assert all(finite(v) for v in opt.state[param].values())
        updates.append(param.detach())
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[0], updates[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_counts_as_zero_for_a_rule_that_reads_it(bad: float) -> None:
    torch.manual_seed(0)
    rule = LSTMRule(LSTMConfig(loss_input=True))
    results = []
    for value in (bad, 0.0):
        param = Parameter(torch.ones(3))
        opt = LearnedOptimizer([param], rule)
        for step in range(4):
            param.grad = torch.full((3,), 0.1 * step)
            loss = torch.tensor(value if step == 1 else 1.0)
            returned = opt.step(lambda loss=loss: loss)
            assert returned is loss
        results.append((param.detach(), opt.state[param]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(finite(v) for v in results[0][1].values())
    with pytest.raises(ValueError, match=r"reads the loss: call step\(closure\)"):
        opt.step()


def test_the_users_gradients_are_left_alone(rule: UpdateRule) -> None:
    param = Parameter(torch.ones(4))
    grad = torch.tensor([1.0, float("nan"), float("inf"), 1e30])
    opt = LearnedOptimizer([param], rule, maximize=True, weight_decay=0.1)
    step_with(opt, grad.clone())
    torch.testing.assert_close(param.grad, grad, rtol=0, atol=0, equal_nan=True)


# ---- any parameters in any groups

GROUPS = (
    {"lr": 1.0},
    {"lr": torch.tensor(0.5), "weight_decay": 0.1, "maximize": True},
    {"lr": 0.0, "weight_decay": 0.1},
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
tensors = st.fixed_dictionaries(
    {
        "group": st.integers(0, 2),
        "shape": st.lists(st.integers(0, 4), max_size=4).map(tuple),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["contiguous", "transposed", "strided", "expanded-grad"]),
        "scale": st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4]),
        "steady": st.booleans(),  # a gradient in every step, or in the second alone
    }
)


def draw(spec: dict, generator: torch.Generator) -> Tensor:
    """A tensor of the shape, the dtype and the layout."""
    wide = torch.complex64 if spec["dtype"].is_complex else torch.float32
    value = torch.randn(spec["shape"], generator=generator, dtype=wide).to(spec["dtype"])
    if spec["layout"] == "transposed" and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if spec["layout"] == "strided" and value.dim() >= 1:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    return value


@settings(max_examples=40)
@given(
    rule=st.sampled_from(ALL_RULES),
    specs=st.lists(tensors, min_size=1, max_size=6),
    state_dtype=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_parameters_any_groups(rule, specs, state_dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(draw(spec, generator)) for spec in specs]
    groups = [
        {
            "params": [p for p, s in zip(params, specs, strict=True) if s["group"] == index],
            **options,
        }
        for index, options in enumerate(GROUPS)
    ]
    opt = LearnedOptimizer(groups, make_rule(rule), state_dtype=state_dtype)
    before = [p.detach().clone() for p in params]
    strides = [p.stride() for p in params]
    for step in range(3):
        for p, spec in zip(params, specs, strict=True):
            grad = draw(spec, generator) * spec["scale"]
            if spec["layout"] == "expanded-grad" and grad.dim():
                grad = grad[:1].expand_as(grad)
            p.grad = grad if spec["steady"] or step == 1 else None
        opt.step()
    for p, b, stride, spec in zip(params, before, strides, specs, strict=True):
        assert finite(p)
        assert (p.shape, p.dtype, p.stride()) == (b.shape, b.dtype, stride)
        frozen, state = spec["group"] == 2, opt.state[p]
        assert not frozen or torch.equal(p, b)
        assert state["step"].item() == (0.0 if frozen else 3.0 if spec["steady"] else 1.0)
        whole = (*p.shape, 2) if p.is_complex() else tuple(p.shape)
        for value in state.values():
            assert finite(value)
            assert value.shape[:-1] == whole or value.shape[:1] == whole[:1] or value.dim() <= 1
    twin = LearnedOptimizer(copy.deepcopy(groups), make_rule(rule), state_dtype=state_dtype)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for mine, other in zip(opt.state.values(), twin.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
