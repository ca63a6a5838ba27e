"""What the benchmarks compare with computes the same as what they measure."""

import torch
from conftest import random_rule
from torch import nn

from benchmarks.plain import PlainNetwork, PlainOptimizer, plain_unroll
from learned_optim import LearnedOptimizer
from learned_optim.meta import ESTIMATORS, EstimatorOptions, Optimizees, build_tasks
from learned_optim.meta.seeding import seeded
from learned_optim.rules.lstm import LSTMRule


def test_plain_optimizer_takes_the_same_steps() -> None:
    rule = random_rule("lstm")
    assert isinstance(rule, LSTMRule)
    ours, plain = (nn.Parameter(torch.zeros(7, 50)) for _ in range(2))
    optimizers = (LearnedOptimizer([ours], rule, warmup=0), PlainOptimizer([plain], rule))
    for _ in range(4):
        ours.grad = plain.grad = torch.randn(7, 50) * 10.0 ** -(6 * torch.rand(7, 50))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_plain_unroll_has_the_same_meta_gradient() -> None:
    rule = random_rule("lstm")
    assert isinstance(rule, LSTMRule)
    generators = [seeded("yardstick"), seeded("yardstick")]
    task = build_tasks("digits").sample(generators[0])
    optimizees = Optimizees(rule, [task], generators[:1])
    expected = ESTIMATORS["replay"](rule, optimizees, 5, EstimatorOptions())
    params = list(task.init(generators[1]).values())
    network = PlainNetwork(rule)
    states = [network.start(param.numel()) for param in params]
    total, grads, _, _ = plain_unroll(network, params, states, lambda: task.batch(generators[1]), 5)
    torch.testing.assert_close(total, expected.losses.sum(), rtol=1e-4, atol=1e-4)
    ours = torch.cat([g.flatten() for g in expected.grads]).sort().values
    theirs = torch.cat([g.flatten() for g in grads]).sort().values
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-3 * ours.abs().max().item())
