"""Idioms of plain training loops: schedulers, closures, clipping, accumulation, averaging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import descending_lstm, flat, make_rule, small_batch, small_net, train


def test_lambda_lr_from_zero_and_back(descending: UpdateRule) -> None:
    """A warm-up that starts at lr = 0: that step is skipped whole, the later ones train."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending)
    scheduler = LambdaLR(opt, lambda step: min(step / 5, 1.0))
    before = flat(model)
    losses = []
    for step in range(30):
        losses += train(model, opt, 1)
        if step == 0:
            assert torch.equal(flat(model), before)
        scheduler.step()
    assert losses[-1] < losses[0]
    assert all(state["step"].item() == 29.0 for state in opt.state.values())


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_one_cycle_lr(descending: UpdateRule, lr) -> None:
    """There is no momentum to cycle, as in SGD without momentum: cycle_momentum=False."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending, lr=lr)
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(opt, max_lr=1.0, total_steps=20)
    scheduler = OneCycleLR(opt, max_lr=1.0, total_steps=20, cycle_momentum=False)
    losses, lrs = [], []
    for _ in range(20):
        lrs.append(float(opt.param_groups[0]["lr"]))
        losses += train(model, opt, 1)
        scheduler.step()
    assert max(lrs) == pytest.approx(1.0)
    assert lrs[0] == pytest.approx(1 / 25)
    assert losses[-1] < losses[0]


def test_reduce_lr_on_plateau(descending: UpdateRule) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending)
    scheduler = ReduceLROnPlateau(opt, factor=0.5, patience=1)
    for metric in (1.0, 2.0, 2.0):
        scheduler.step(metric)
    assert opt.param_groups[0]["lr"] == 0.5
    before = flat(model)
    train(model, opt, 1)
    half = flat(model) - before
    whole_model = small_net()
    train(whole_model, LearnedOptimizer(whole_model.parameters(), descending), 1)
    assert_close(half, 0.5 * (flat(whole_model) - before), rtol=1e-4, atol=1e-7)


def test_a_scheduler_resumes_with_the_optimizer(descending: UpdateRule) -> None:
    def build(seed: int = 0) -> tuple[nn.Module, LearnedOptimizer, SequentialLR]:
        model = small_net(seed)
        opt = LearnedOptimizer(model.parameters(), descending)
        warm, flat_lr = LinearLR(opt, 0.1, total_iters=4), LambdaLR(opt, lambda step: 0.9**step)
        return model, opt, SequentialLR(opt, [warm, flat_lr], milestones=[4])

    def advance(parts: tuple[nn.Module, LearnedOptimizer, SequentialLR], steps: int) -> list[float]:
        model, opt, scheduler = parts
        losses = []
        for _ in range(steps):
            losses += train(model, opt, 1)
            scheduler.step()
        return losses

    whole = advance(build(), 10)
    first = build()
    begun = advance(first, 6)
    second = build(seed=1)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    assert begun + advance(second, 4) == whole


def test_lbfgs_style_closure(descending: UpdateRule) -> None:
    """Closure and plain call make the same steps."""
    x, y = small_batch()
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(8)]
    plain = small_net()
    assert train(plain, LearnedOptimizer(plain.parameters(), descending), 8) == losses
    assert torch.equal(flat(model), flat(plain))


def test_gradient_accumulation_equals_the_large_batch(descending: UpdateRule) -> None:
    x, y = small_batch(n=16)
    models = [small_net(), small_net()]
    for model, parts in zip(models, (1, 4), strict=True):
        opt = LearnedOptimizer(model.parameters(), descending)
        for _ in range(5):
            opt.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            opt.step()
    # Adam divides tiny gradients by their size, so float error in them shows.
    assert_close(flat(models[0]), flat(models[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_gradient_clipping(clip) -> None:
    """Clipping acts on what the rule sees: SGD's step length shows it."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), make_rule("sgd"))
    x, y = small_batch()
    (1e4 * nn.functional.cross_entropy(model(x), y)).backward()
    clip(model.parameters(), 0.5)
    expected = flat(model) - 0.01 * torch.cat([p.grad.flatten() for p in model.parameters()])
    assert expected.sub(flat(model)).norm() < 0.1
    opt.step()
    assert_close(flat(model), expected, rtol=1e-6, atol=1e-7)


def test_swa_and_ema(descending: UpdateRule) -> None:
    """The averages of torch.optim.swa_utils are those of the visited weights."""
    model = small_net()
    swa = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    opt = LearnedOptimizer(model.parameters(), descending)
    visited = []
    for _ in range(6):
        train(model, opt, 1)
        swa.update_parameters(model)
        ema.update_parameters(model)
        visited.append(flat(model).clone())
    assert_close(flat(swa.module), torch.stack(visited).mean(0), rtol=1e-5, atol=1e-6)
    expected = visited[0]
    for weights in visited[1:]:
        expected = 0.5 * expected + 0.5 * weights
    assert_close(flat(ema.module), expected, rtol=1e-5, atol=1e-6)


def test_a_model_moved_after_construction_keeps_training() -> None:
    """``model.double()`` swaps the data under the parameters, as ``model.to(device)`` does."""
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm())
    model.double()
    losses = train(model, opt, 20)
    assert losses[-1] < losses[0]
    assert flat(model).dtype is torch.float64


def test_parameters_frozen_and_thawed(descending: UpdateRule) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(model, opt, 3)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in opt.state
    model[0].requires_grad_(True)
    train(model, opt, 1)
    assert not torch.equal(model[0].weight, before)
