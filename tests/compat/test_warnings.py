"""What the optimizer says of misuse: once, at the user's line, and only where it is true."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import SWALR

from learned_optim import LearnedOptimizer
from learned_optim.rules.classical import SGDRule

from .common import descending_lstm, step_with
from .test_total_steps import Annealed, more, optimizer


@pytest.fixture
def issued() -> Iterator[Callable[[], list[str]]]:
    """Messages so far; each must point at this file or at the step that these tests share."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def messages() -> list[str]:
            for w in caught:
                assert w.filename.endswith(("compat/test_warnings.py", "compat/common.py"))
            return [str(w.message) for w in caught]

        yield messages


def step(opt: LearnedOptimizer, *grads: float | None) -> None:
    step_with(opt, *(None if grad is None else torch.tensor([grad]) for grad in grads))


# ---- a scheduler beside total_steps

LRS = pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])


@LRS
@pytest.mark.parametrize(
    "make",
    [
        lambda opt: CosineAnnealingLR(opt, 50),
        lambda opt: LambdaLR(opt, lambda t: min(1.0, (t + 1) / 3) * (1 - t / 50)),
        lambda opt: StepLR(opt, 2, 0.5),
    ],
    ids=["cosine", "warm-up and linear", "steps"],
)
def test_a_scheduler_beside_total_steps(make, lr, issued) -> None:
    lr = lr.clone() if isinstance(lr, Tensor) else lr
    for total_steps in (None, 50):
        opt = optimizer(lr=lr, total_steps=total_steps)
        scheduler = make(opt)
        for _ in range(12):
            more(opt, 1)
            scheduler.step()
        assert len(issued()) == (total_steps is not None)
    assert "anneals twice" in issued()[0]


def test_rates_that_are_no_schedule(issued) -> None:
    """Thawed groups, layer-wise rates, a warm-up, a decision in mid-run."""
    opt = optimizer(total_steps=50)
    opt.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.0})
    for rates in ((1.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.5, 0.25), (0.0, 0.25), (0.3, 0.25)):
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate
        for _ in range(3):
            step(opt, 1.0, 1.0)
    for t in range(5):
        opt.param_groups[0]["lr"] = 0.5 + 0.1 * t
        step(opt, 1.0, 1.0)
    assert issued() == []


def test_rates_of_other_optimizers_in_schedulers(issued) -> None:
    for make in (
        lambda opt: SWALR(opt, swa_lr=0.05, anneal_epochs=2),
        lambda opt: OneCycleLR(opt, max_lr=1e-3, total_steps=50, cycle_momentum=False),
    ):
        opt = optimizer(total_steps=50)
        scheduler = make(opt)
        for _ in range(4):
            more(opt, 1)
            scheduler.step()
    swa, cycle = issued()
    assert "swa_lr=0.05, which makes learned updates 20 times shorter" in swa
    assert "max_lr=0.001, which makes learned updates 1000 times shorter" in cycle


# ---- past the end of the run


@LRS
def test_past_the_end_counted_by_the_updates_of_a_parameter(lr, issued) -> None:
    """Parameters whose gradients come in turn have had half as many updates as there were."""
    opt = optimizer(2, lr=lr, total_steps=3)
    opt.add_param_group({"params": [Parameter(torch.zeros(1))], "total_steps": 9})
    for t in range(6):
        step(opt, *((1.0, None) if t % 2 else (None, 1.0)), 1.0)
    assert issued() == []
    step(opt, 1.0, 1.0, 1.0)
    step(opt, 1.0, 1.0, 1.0)
    (message,) = issued()
    assert "step 4 is past total_steps=3: the rule '' holds the last rate" in message


def test_a_resumed_run_knows_where_it_is_and_may_be_extended(issued) -> None:
    opt = optimizer(total_steps=3)
    more(opt, 3)
    longer, same = optimizer(total_steps=5), optimizer()
    for fresh in (longer, same):
        fresh.load_state_dict(opt.state_dict())
    more(longer, 2)
    assert "total_steps=5 of this optimizer is kept" in issued()[0]
    more(same, 1)
    assert len(issued()) == 2
    assert "step 4 is past total_steps=3" in issued()[1]
    more(longer, 1)
    assert "step 6 is past total_steps=5" in issued()[2]


def test_past_the_runs_that_a_rule_was_trained_on(issued) -> None:
    rule = Annealed()
    rule.trained_steps = 5
    opt = optimizer(rule=rule)
    more(opt, 5)
    assert issued() == []
    more(opt, 5)
    (message,) = issued()
    assert "step 6 is past the 5 steps of the longest runs" in message


# ---- gradients without a value


@pytest.mark.parametrize(("bad", "healthy"), [(math.nan, 0), (math.inf, 70)])
def test_gradients_without_a_finite_entry(bad: float, healthy: int, issued) -> None:
    opt = optimizer()
    for _ in range(healthy):
        step(opt, 1.0)
    for _ in range(130 if healthy else 10):
        step(opt, bad)
    (message,) = issued()
    assert "had no finite entry in 5 steps" in message


def test_a_few_bad_batches_are_no_word_worth(issued) -> None:
    opt = optimizer()
    for t in range(100):
        step(opt, math.nan if t % 64 < 4 else 1.0)
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(0))]
    opt = LearnedOptimizer(params, descending_lstm())
    for _ in range(10):
        step_with(opt, torch.tensor([math.nan, 1.0, math.nan]), None)
    assert issued() == []


# ---- learning rates


def test_a_rate_that_became_nan_has_its_own_words() -> None:
    for lr in (1.0, torch.tensor(1.0)):
        opt = optimizer(lr=lr)
        more(opt, 1)
        before = opt.param_groups[0]["params"][0].item()
        for bad in (math.nan, -0.1, math.inf, torch.tensor(math.nan)):
            opt.param_groups[0]["lr"] = bad
            with pytest.raises(ValueError, match=r"lr of parameter group 0 is .* a learning rate"):
                more(opt, 1)
        assert opt.param_groups[0]["params"][0].item() == before


def test_values_set_in_mid_run_are_checked() -> None:
    opt = optimizer()
    more(opt, 1)
    (group,) = opt.param_groups
    for key, bad in (("weight_decay", -1.0), ("warmup", 2.5)):
        before, group[key] = group[key], bad
        with pytest.raises(ValueError, match=key):
            more(opt, 1)
        group[key] = before


def test_small_rates_at_construction(issued) -> None:
    LearnedOptimizer(nn.Linear(2, 2).parameters(), descending_lstm(), lr=1e-3)

    class Mine(LearnedOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, descending_lstm(), lr=1e-3)

    Mine(nn.Linear(2, 2).parameters())
    assert ["1000 times too slowly" in message for message in issued()] == [True, True]


# ---- what belongs to other optimizers


@pytest.mark.parametrize(
    "given",
    [{"betas": (0.9, 0.95)}, {"eps": 1e-8, "fused": True}, {"momentum": 0.9, "nesterov": True}],
    ids=lambda given: " ".join(given),
)  # fmt: skip
def test_keywords_of_other_optimizers(given: dict[str, Any], issued) -> None:
    params = [Parameter(torch.ones(1)) for _ in range(2)]
    with pytest.raises(
        TypeError, match=f"takes no {', '.join(sorted(given))}: leave out (it|them)"
    ):
        LearnedOptimizer(params, descending_lstm(), **given)
    with pytest.raises(TypeError, match=r"no argument 'total_step'. Did you mean 'total_steps'"):
        LearnedOptimizer(params, descending_lstm(), total_step=100)
    groups = [{"params": [p], "name": "mine", **given} for p in params]
    opt = LearnedOptimizer(groups, descending_lstm())
    (message,) = issued()
    assert f"{', '.join(sorted(given))} in a parameter group" in message
    assert opt.param_groups[0]["name"] == "mine"


def test_a_length_that_the_rule_does_not_read(issued) -> None:
    groups = [{"params": [Parameter(torch.ones(1))]} for _ in range(2)]
    LearnedOptimizer(groups, SGDRule(), total_steps=9)
    (message,) = issued()
    assert "total_steps=9 has no effect" in message
