"""Idioms of plain training loops: resumed schedulers, moved and frozen parameters."""

import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import descending_lstm, flat, small_net, train


def test_a_scheduler_resumes_with_the_optimizer() -> None:
    def build(seed: int = 0):
        model = small_net(seed)
        opt = LearnedOptimizer(model.parameters())
        warm, flat_lr = LinearLR(opt, 0.1, total_iters=4), LambdaLR(opt, lambda step: 0.9**step)
        return model, opt, SequentialLR(opt, [warm, flat_lr], milestones=[4])

    def advance(parts, steps: int) -> list[float]:
        model, opt, scheduler = parts
        losses = []
        for _ in range(steps):
            losses += train(model, opt, 1)
            scheduler.step()
        return losses

    whole, first, second = advance(build(), 10), build(), build(seed=1)
    begun = advance(first, 6)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    assert begun + advance(second, 4) == whole


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
