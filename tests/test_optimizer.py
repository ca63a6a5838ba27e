"""Everyday use of :class:`LearnedOptimizer`; its wider contract is tested in ``tests/compat``."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from compat.common import descend
from conftest import random_rule
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from learned_optim import LearnedOptimizer
from learned_optim.meta import Optimizees, build_tasks
from learned_optim.meta.seeding import seeded
from learned_optim.rules import rule_names
from learned_optim.rules.lstm import LSTMRule

RULES = rule_names()


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("task_name", ["quadratic", "digits-torch"])
def test_wrapper_equals_differentiable_unroll(name: str, task_name: str) -> None:
    """What is meta-trained is what users run: the same numbers, tensor by tensor."""
    rule, steps = random_rule(name), 12
    family = build_tasks(task_name)
    generator = seeded("unroll")
    optimizees = Optimizees(rule, [family.sample(generator)], [generator])
    unrolled = torch.stack([optimizees.advance(rule) for _ in range(steps)])[:, 0]

    generator = seeded("unroll")
    task = family.sample(generator)
    weights = {n: nn.Parameter(p) for n, p in task.init(generator).items()}
    optimizer = LearnedOptimizer(weights.values(), rule, warmup=0)
    losses = descend(optimizer, steps, lambda: task.loss(weights, task.batch(generator)))
    torch.testing.assert_close(torch.tensor(losses), unrolled, rtol=2e-4, atol=1e-5)


def test_making_an_optimizer_leaves_the_global_generator_alone() -> None:
    """Swapping Adam out must not change anybody's shuffling, dropout or initialization."""
    before = torch.get_rng_state()
    LearnedOptimizer(params(), "quadratic")
    LearnedOptimizer(params(), random_rule("lstm"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1.0\. .* pass lr=1.0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be 1-element, got one of shape \(2,\)"),
        ({"weight_decay": -0.1}, ValueError, r"Invalid weight_decay value: -0.1\. .* 0.0 is none"),
        ({"state_dtype": torch.int8}, ValueError, "floating point dtype, got torch.int8"),
        *(
            ({"rule": given}, TypeError, r"second argument .*\(params\) needs none")
            for given in (None, LSTMRule, 1, 1e-3, np.float32(1e-3), torch.tensor(0.1))
        ),
        ({"rule": "nonesuch"}, ValueError, "unknown checkpoint 'nonesuch'; known: "),
        ({"rule": "missing.safetensors"}, FileNotFoundError, "no checkpoint .* at missing"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer(params(), **{"rule": random_rule("lstm"), **arguments})


def test_repr_names_rule_checkpoint_and_groups() -> None:
    text = repr(LearnedOptimizer(params(), random_rule("lstm"), weight_decay=0.1))
    assert text.startswith("LearnedOptimizer (\nUpdate rule: lstm ")
    assert "checkpoint" not in text
    assert "weight_decay: 0.1" in text
    named = LearnedOptimizer(params(), "mnist")
    assert ", checkpoint mnist\n" in repr(copy.deepcopy(named))
    assert re.search(r", checkpoint \S+ \(default\)\n", repr(LearnedOptimizer(params())))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(result):
            if isinstance(made, Tensor) and storage(made) not in before:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // 4)
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("name", "config"), [("horizon", 0), ("equivariant", 1), ("lstm", 1)])
def test_nothing_as_large_as_the_parameter_is_allocated(name: str, config: int) -> None:
    param = nn.Parameter(torch.randn(1000, 1200))
    param.grad = torch.randn_like(param)
    optimizer = LearnedOptimizer([param], random_rule(name, config=config))
    optimizer.step()  # makes the state
    with Largest() as largest:
        optimizer.step()
    assert largest.elements < param.numel()
