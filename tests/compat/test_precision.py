"""Parameters in every floating dtype, half-precision state, loss scaling."""

import pytest
import torch
from conftest import trajectory
from torch import nn
from torch.nn import Parameter
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import descending_lstm, flat, small_batch, small_net, step_with, train

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_is_rounded_once(rule: UpdateRule, dtype) -> None:
    """Rule and state are float32; only the sum with the parameter is rounded to its dtype."""
    # Of one row: rules that rotate matrices leave it alone.
    start, grad = torch.randn(1, 18, dtype=dtype), torch.randn(1, 18, dtype=dtype)
    param = Parameter(start.clone())
    horizon = 100 if rule.reads_horizon else None
    opt = LearnedOptimizer([param], rule, lr=0.5, warmup=0, total_steps=horizon)
    step_with(opt, grad)
    assert all(value.dtype is torch.float32 for value in opt.state[param].values())
    update = trajectory(rule, grad.float().unsqueeze(0), start.float())[0]
    expected = (start.to(torch.promote_types(dtype, torch.float32)) + 0.5 * update).to(dtype)
    # The in-place path may differ from the pure form in the last bits of float32.
    assert_close(param.detach(), expected, rtol=1e-6 if dtype.itemsize > 2 else 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_dtype_is_used_for_coordinates_and_kept(rule: UpdateRule, dtype) -> None:
    """Entries of whole tensors stay as they are."""
    param = Parameter(torch.randn(4, 3))
    opt = LearnedOptimizer([param], rule, state_dtype=dtype)
    for _ in range(90):
        step_with(opt, torch.randn(4, 3))
    state = opt.state[param]
    assert state["step"].item() == 90.0
    for key, value in state.items():
        per_tensor = key == "step" or key in (*rule.tensor_state, *rule.matrix_state)
        assert value.dtype is (torch.float32 if per_tensor else dtype), key


def test_a_chosen_state_dtype_wins_over_the_saved_one() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm())
    train(model, opt, 2)
    half = LearnedOptimizer(model.parameters(), descending_lstm(), state_dtype=torch.bfloat16)
    half.load_state_dict(opt.state_dict())
    for p in model.parameters():
        assert half.state[p]["cell"].dtype is torch.bfloat16
        assert torch.equal(half.state[p]["cell"], opt.state[p]["cell"].bfloat16())
    train(model, half, 1)


def test_a_model_moved_after_construction_keeps_training() -> None:
    """``model.double()`` swaps the data under the parameters, as ``model.to(device)`` does."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm())
    model.double()
    losses = train(model, opt, 20)
    assert losses[-1] < losses[0]
    assert flat(model).dtype is torch.float64


@pytest.mark.parametrize("name", ["default", "default-fast", "mnist"])
def test_grad_scaler_skips_overflows_without_a_trace(name: str) -> None:
    """Skipped steps change nothing, so the run equals one in which they never happened."""
    model, plain = small_net(), small_net()
    opt, other = (LearnedOptimizer(m.parameters(), name) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, y = small_batch()
    for step in range(8):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * float("inf") if step in (2, 5) else loss).backward()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**14
    train(plain, other, 6)
    assert_close(flat(model), flat(plain), rtol=1e-5, atol=1e-6)
    assert all(state["step"].item() == 6.0 for state in opt.state.values())
