"""The weights that evolution strategies begin with, as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for


def trainable(rule: UpdateRule) -> UpdateRule:
    """The rule, if runs of populations can train it.

    Raises:
        ValueError: it has no weights, or reads the loss.
    """
    if not list(rule.parameters()):
        raise ValueError(f"rule {rule.name!r} has no weights to train")
    if rule.needs_loss:
        raise ValueError(
            f"rule {rule.name!r} reads the loss, which evolution strategies do not hand to it: "
            f"configure it without, or train it by a recipe of backpropagation"
        )
    return rule


def initial_weights(rule: UpdateRule, seed: int, start: str = "") -> Tensor:
    """Weights before training as one vector, float32, in the order of ``rule.parameters()``.

    Those of the horizon rule's hidden layer are normal and all others zero; those of other rules
    are what their constructors draw. With a checkpoint to start from, they are its.

    Raises:
        ValueError: the checkpoint's rule is of another kind or size.
    """
    if start:
        begun = rule_for(rule.config)
        begun.init_from(load_rule(start))
        return parameters_to_vector(begun.parameters()).detach().float()
    if rule.name == "horizon":
        first = next(rule.parameters())  # (units, features)
        weights = torch.zeros(sum(p.numel() for p in rule.parameters()))
        normal = torch.randn(first.numel(), generator=torch.Generator().manual_seed(seed))
        weights[: first.numel()] = normal / math.sqrt(first.shape[1])
        return weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parameters_to_vector(rule_for(rule.config).parameters()).detach().clone()
