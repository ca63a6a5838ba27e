"""``total_steps`` and ``warmup``: group values that rules and the optimizer act on."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR

from learned_optim import LearnedOptimizer
from learned_optim.rules import RuleConfig, UpdateRule
from learned_optim.rules.classical import SGDConfig, SGDRule

from .common import descending_lstm


@dataclass(frozen=True)
class AnnealedConfig(RuleConfig):
    pass


class Annealed(UpdateRule):
    """Gradient descent whose rate falls linearly to zero at the end of the run."""

    Config = AnnealedConfig
    reads_horizon = True
    zero_preserving = True

    def tensor_features(self, means, segments, context):
        total = context.total_steps
        left = torch.ones_like(context.step) if total is None else 1 - context.step / total
        return None, left.clamp(min=0.0).unsqueeze(0)

    def coordinate_features(self, grad, state, param, stats):
        return None, (-grad * stats[0]).unsqueeze(-1)


def updates(rule: UpdateRule, steps: int, **settings: Any) -> tuple[list[float], LearnedOptimizer]:
    """The updates of a parameter whose gradient is always one."""
    param = Parameter(torch.zeros(1))
    opt = LearnedOptimizer([param], rule, **settings)
    return more(opt, steps), opt


def more(opt: LearnedOptimizer, steps: int) -> list[float]:
    (param,), moves = opt.param_groups[0]["params"], []
    for _ in range(steps):
        before = param.item()
        param.grad = torch.ones(1)
        opt.step()
        moves.append(param.item() - before)
    return moves


# ---- the length of the run


def test_a_rule_is_told_the_length_of_the_run() -> None:
    assert updates(Annealed(), 4, total_steps=4)[0] == pytest.approx([-1, -0.75, -0.5, -0.25])
    assert updates(Annealed(), 5)[0] == pytest.approx([-1] * 5)


@pytest.mark.parametrize("bad", [0, -3, 2.5, "100", True, float("nan")])
def test_total_steps_is_a_positive_integer(bad: object) -> None:
    params = [Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="positive integer, got"):
        LearnedOptimizer(params, Annealed(), total_steps=bad)
    opt = LearnedOptimizer(params, Annealed())
    with pytest.raises(ValueError, match="positive integer, got"):
        opt.add_param_group({"params": [Parameter(torch.ones(1))], "total_steps": bad})


def test_groups_have_their_own_length_and_warmup() -> None:
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    groups = [{"params": [a], "total_steps": 2}, {"params": [b], "warmup": 4}]
    opt = LearnedOptimizer(groups, Annealed(), total_steps=8)
    for _ in range(2):
        a.grad = b.grad = torch.ones(1)
        opt.step()
    assert a.item() == pytest.approx(-1.5)
    assert b.item() == pytest.approx(-(0.25 + 0.5 * 7 / 8))


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_both_are_saved_and_go_on(how: str) -> None:
    whole = updates(Annealed(), 6, total_steps=8, warmup=4)[0]
    begun, opt = updates(Annealed(), 3, total_steps=8, warmup=4)
    if how == "deepcopy":
        twin = copy.deepcopy(opt)
    else:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        twin = LearnedOptimizer(
            [Parameter(opt.param_groups[0]["params"][0].detach().clone())], Annealed()
        )
        twin.load_state_dict(torch.load(file, weights_only=True))
    assert begun + more(twin, 3) == pytest.approx(whole)
    assert twin.param_groups[0]["total_steps"] == 8
    assert twin.param_groups[0]["warmup"] == 4


def test_a_rule_that_does_not_read_it_says_so_once() -> None:
    params = [Parameter(torch.ones(1)), Parameter(torch.ones(1))]
    with pytest.warns(UserWarning, match=r"total_steps=9 has no effect: .* 'sgd'") as caught:
        LearnedOptimizer([{"params": [p]} for p in params], SGDRule(), total_steps=9)
    assert len(caught) == 1


def test_stepping_past_the_end_warns_once() -> None:
    opt = updates(Annealed(), 3, total_steps=3)[1]
    with pytest.warns(
        UserWarning, match=r"step 4 is past total_steps=3: .* holds the last rate"
    ) as w:
        more(opt, 3)
    assert len(w) == 1
    fresh = LearnedOptimizer([Parameter(torch.zeros(1))], Annealed())
    fresh.load_state_dict(opt.state_dict())
    with pytest.warns(UserWarning, match="step 7 is past"):  # a resumed run knows where it is
        more(fresh, 1)


def test_a_scheduler_beside_it_warns_once() -> None:
    opt = updates(Annealed(), 1, total_steps=50)[1]
    scheduler = ExponentialLR(opt, gamma=0.5)
    more(opt, 1)
    scheduler.step()
    with pytest.warns(UserWarning, match=r"lr went from 1 to 0\.5 while.*anneals twice") as w:
        more(opt, 1)
    assert len(w) == 1
    scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more(opt, 1)
    plain = updates(Annealed(), 1)[1]
    scheduler = ExponentialLR(plain, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            more(plain, 1)
            scheduler.step()


def test_no_warning_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = updates(Annealed(), 5, total_steps=6)[1]
        opt.add_param_group({"params": [Parameter(torch.zeros(1))]})
        more(opt, 1)
        updates(SGDRule(), 5)


# ---- the warm-up


def test_the_ramp_by_hand() -> None:
    rule = SGDRule(SGDConfig(lr=1.0))
    assert updates(rule, 6, warmup=4)[0] == pytest.approx([-0.25, -0.5, -0.75, -1, -1, -1])
    assert updates(rule, 2, warmup=4, lr=0.5)[0] == pytest.approx([-0.125, -0.25])
    assert updates(rule, 2, warmup=0)[0] == pytest.approx([-1, -1])
    assert updates(rule, 2)[0] == pytest.approx([-1, -1])  # classical rules ask for none


def test_tensors_that_thaw_later_have_a_ramp_of_their_own() -> None:
    first, later = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    opt = LearnedOptimizer([first, later], SGDRule(SGDConfig(lr=1.0)), warmup=2)
    for step in range(4):
        first.grad = torch.ones(1)
        later.grad = torch.ones(1) if step >= 3 else None
        opt.step()
    assert first.item() == pytest.approx(-3.5)
    assert later.item() == pytest.approx(-0.5)


def test_a_rule_brings_its_own_warmup(rule: UpdateRule) -> None:
    params = [Parameter(torch.ones(1))]
    opt = LearnedOptimizer(params, rule)
    assert opt.param_groups[0]["warmup"] == rule.warmup_steps
    assert LearnedOptimizer(params, rule, warmup=7).param_groups[0]["warmup"] == 7


@pytest.mark.parametrize("bad", [-1, 2.5, True, "5"])
def test_warmup_is_a_number_of_steps(bad: object) -> None:
    with pytest.raises(ValueError, match="integer of 0 or more, got"):
        LearnedOptimizer([Parameter(torch.ones(1))], SGDRule(), warmup=bad)


def test_weight_decay_is_not_warmed_up() -> None:
    param = Parameter(torch.ones(1))
    opt = LearnedOptimizer([param], descending_lstm(), warmup=100, weight_decay=100.0)
    param.grad = torch.zeros(1)
    opt.step()
    assert param.item() == pytest.approx(0.9)


@pytest.mark.parametrize("name", ["coordinatewise"])
def test_the_first_updates_do_not_undo_a_layer(name: str) -> None:
    """Relative change of fresh weights after three equal gradients: Adam's is .06."""

    def change(**settings: Any) -> float:
        torch.manual_seed(0)
        weight = Parameter(torch.nn.Linear(128, 128).weight.detach().clone())
        start, grad = weight.detach().clone(), torch.randn(128, 128)
        opt = LearnedOptimizer([weight], name, **settings)
        for _ in range(3):
            weight.grad = grad
            opt.step()
        return float((weight.detach() - start).norm() / start.norm())

    assert change() < 0.25
    assert change(warmup=0) > 1.0


def test_tensors_on_a_device_ramp_without_being_read() -> None:
    """The compiled graph and a tensor ``lr`` see the ramp as well."""
    torch._dynamo.reset()
    param: Tensor = Parameter(torch.zeros(1))
    opt = LearnedOptimizer([param], SGDRule(SGDConfig(lr=1.0)), lr=torch.tensor(1.0), warmup=4)
    step = torch.compile(opt.step, backend="eager", fullgraph=True)
    for _ in range(3):
        param.grad = torch.ones(1)
        step()
    assert param.item() == pytest.approx(-1.5)
    torch._dynamo.reset()
