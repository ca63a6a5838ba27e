"""The oracle: hand-written rules inside the wrapper must follow ``torch.optim``."""

from collections.abc import Callable

import pytest
import torch
from compat.common import flat, small_batch, small_net
from torch import nn

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule
from learned_optim.rules.classical import (
    AdamConfig,
    AdamRule,
    RMSpropConfig,
    RMSpropRule,
    SGDConfig,
    SGDRule,
)

PAIRS: dict[str, tuple[UpdateRule, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (SGDRule(SGDConfig(lr=0.1)), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        SGDRule(SGDConfig(lr=0.03, momentum=0.9)),
        lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    ),
    "nesterov": (
        SGDRule(SGDConfig(lr=0.03, momentum=0.9, nesterov=True)),
        lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (RMSpropRule(RMSpropConfig(lr=0.003)), lambda p: torch.optim.RMSprop(p, lr=0.003)),
    "adam": (AdamRule(AdamConfig(lr=0.01)), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adam-beta": (
        AdamRule(AdamConfig(lr=0.01, beta1=0.5, beta2=0.9, eps=1e-3)),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
    ),
    # At AdamW's usual learning rate, in whose units weight decay is.
    "adamw": (AdamRule(), lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_follows_torch_optim(name: str) -> None:
    rule, make = PAIRS[name]
    ours, theirs = small_net(), small_net()
    decay = 0.1 if name == "adamw" else 0.0
    learned = LearnedOptimizer(ours.parameters(), rule, weight_decay=decay)
    optimizers = (learned, make(theirs.parameters()))
    for step in range(100):
        x, y = small_batch(step)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=2e-5, atol=2e-6)
