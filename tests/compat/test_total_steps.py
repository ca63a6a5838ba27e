"""``total_steps`` and ``warmup``: group values that rules and the optimizer act on."""

import copy
import math
import warnings
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from learned_optim import LearnedOptimizer
from learned_optim.rules import RuleConfig, UpdateRule
from learned_optim.rules.classical import SGDConfig, SGDRule

from .common import descending_lstm, step_with


@dataclass(frozen=True)
class AnnealedConfig(RuleConfig):
    pass


class Annealed(UpdateRule):
    """Gradient descent whose rate falls linearly to zero at the end of the run."""

    Config = AnnealedConfig
    reads_horizon = True
    zero_preserving = True

    def default_weight_decay(self, total_steps):
        return 0.0 if total_steps is None else 8.0 / total_steps

    def tensor_features(self, means, segments, context):
        total = context.total_steps
        left = torch.ones_like(context.step) if total is None else 1 - context.step / total
        return None, left.clamp(min=0.0).unsqueeze(0)

    def coordinate_features(self, grad, state, param, stats):
        return None, (-grad * stats[0]).unsqueeze(-1)


def optimizer(n: int = 1, rule: UpdateRule | None = None, **settings: Any) -> LearnedOptimizer:
    """Of ``n`` numbers."""
    params = [Parameter(torch.zeros(1)) for _ in range(n)]
    return LearnedOptimizer(params, rule or Annealed(), **settings)


def updates(rule: UpdateRule, steps: int, **settings: Any) -> tuple[list[float], LearnedOptimizer]:
    """The updates of a parameter whose gradient is always one."""
    opt = optimizer(rule=rule, **settings)
    return more(opt, steps), opt


def more(opt: LearnedOptimizer, steps: int) -> list[float]:
    (param,), moves = opt.param_groups[0]["params"], []
    for _ in range(steps):
        before = param.item()
        step_with(opt, torch.ones(1))
        moves.append(param.item() - before)
    return moves


# ---- the length of the run


def test_a_rule_is_told_the_length_of_the_run() -> None:
    moves = updates(Annealed(), 4, total_steps=4, weight_decay=0.0)[0]
    assert moves == pytest.approx([-1, -0.75, -0.5, -0.25])
    assert updates(Annealed(), 5)[0] == pytest.approx([-1] * 5)


NUMBERS = [100.0, np.int64(100), np.array(100), Decimal(100), torch.tensor([100.0])]
UNKNOWN = [None, math.inf, -1, torch.tensor(math.inf)]  # as trainers write it


@pytest.mark.parametrize("value", [*NUMBERS, *UNKNOWN], ids=repr)
def test_whole_numbers_of_any_type(value: object) -> None:
    opt = optimizer(total_steps=value)
    total = opt.param_groups[0]["total_steps"]
    assert total is None if any(value is unknown for unknown in UNKNOWN) else total == 100
    assert isinstance(total, (int, type(None)))


@pytest.mark.parametrize("bad", [0, -3, 2.5, "100", True, math.nan, torch.ones(2)], ids=repr)
def test_what_is_no_length(bad: object) -> None:
    with pytest.raises(ValueError, match="positive whole number, got"):
        optimizer(total_steps=bad)
    opt = optimizer()
    with pytest.raises(ValueError, match="positive whole number, got"):
        opt.add_param_group({"params": [Parameter(torch.ones(1))], "total_steps": bad})
    more(opt, 1)
    opt.param_groups[0]["total_steps"] = bad
    with pytest.raises(ValueError, match="positive whole number, got"):
        more(opt, 1)


def test_groups_have_their_own_length_and_warmup() -> None:
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    groups = [{"params": [a], "total_steps": 2}, {"params": [b], "warmup": 4}]
    opt = LearnedOptimizer(groups, Annealed(), total_steps=8, weight_decay=0.0)
    for _ in range(2):
        step_with(opt, torch.ones(1), torch.ones(1))
    assert a.item() == pytest.approx(-1.5)
    assert b.item() == pytest.approx(-(0.25 + 0.5 * 7 / 8))


def test_a_length_set_in_mid_run_counts_from_the_next_step() -> None:
    opt = updates(Annealed(), 2, total_steps=4)[1]
    opt.param_groups[0]["total_steps"] = np.int64(8)
    assert more(opt, 2) == pytest.approx([-0.75, -0.625], abs=0.01)
    opt.param_groups[0]["total_steps"] = math.inf
    assert more(opt, 1) == pytest.approx([-1.0], abs=0.01)
    assert opt.param_groups[0]["total_steps"] is None


# ---- weight decay of the rule's own, which depends on the length


def test_the_rules_own_decay_follows_the_length() -> None:
    opt = updates(Annealed(), 1)[1]
    (group,) = opt.param_groups
    assert group["weight_decay"] == 0.0
    for length, decay in ((16, 0.5), (4, 2.0), (None, 0.0)):
        group["total_steps"] = length
        more(opt, 1)
        assert group["weight_decay"] == decay


@pytest.mark.parametrize("given", [0.0, 0.25])
@pytest.mark.parametrize("settings", [{"total_steps": 4}, {"weight_decay": 1.0}])
def test_a_decay_of_the_users_stays(given: float, settings: dict[str, Any]) -> None:
    opt = updates(Annealed(), 1, **settings)[1]
    (group,) = opt.param_groups
    group["weight_decay"] = given
    more(opt, 1)
    group["total_steps"] = 16
    more(opt, 1)
    assert group["weight_decay"] == given


# ---- loading


def by_distributed_checkpoint(
    saved: LearnedOptimizer, target: LearnedOptimizer, folder: Path
) -> None:
    models = []
    for opt in (saved, target):
        model = torch.nn.Module()
        model.weight = opt.param_groups[0]["params"][0]
        models.append(model)
    written = {"optimizer": get_optimizer_state_dict(models[0], saved)}
    dcp.save(written, checkpoint_id=folder / "dcp", no_dist=True)
    read = {"optimizer": get_optimizer_state_dict(models[1], target)}
    dcp.load(read, checkpoint_id=folder / "dcp", no_dist=True)
    set_optimizer_state_dict(models[1], target, read["optimizer"])


@pytest.mark.filterwarnings("ignore:.*(torch.distributed|single process|TypedStorage)")
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(
    ("saved", "told", "counts", "decay"),
    [(4, 8, 8, 1.0), (8, 4, 4, 2.0), (None, 8, 8, 1.0), (8, None, 8, 1.0), (None, None, None, 0.0)],
)
def test_the_length_that_was_told_wins_over_the_saved_one(
    distributed: bool,
    saved: int | None,
    told: int | None,
    counts: int | None,
    decay: float,
    tmp_path: Path,
) -> None:
    opt = updates(Annealed(), 2, total_steps=saved)[1]
    fresh = optimizer(total_steps=told)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if distributed:
            by_distributed_checkpoint(opt, fresh, tmp_path)
        else:
            fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    said = [str(w.message) for w in caught if "of the loaded state is not" in str(w.message)]
    assert len(said) == (told is not None and told != saved)
    assert fresh.param_groups[0]["total_steps"] == counts
    assert fresh.param_groups[0]["weight_decay"] == decay
    fresh.param_groups[0]["weight_decay"] = 0.0
    left = 1.0 if counts is None else 1 - 2 / counts
    assert more(fresh, 1) == pytest.approx([-left])


def test_of_two_loaded_states_the_second_counts() -> None:
    fresh = optimizer()
    for total_steps in (8, 16, None):
        fresh.load_state_dict(updates(Annealed(), 2, total_steps=total_steps)[1].state_dict())
        fresh = copy.deepcopy(fresh)
        assert fresh.param_groups[0]["total_steps"] == total_steps
    fresh.param_groups[0]["total_steps"] = 32
    with pytest.warns(UserWarning, match="total_steps=32 of this optimizer is kept"):
        fresh.load_state_dict(updates(Annealed(), 2, total_steps=8)[1].state_dict())


def test_other_values_of_groups_are_the_saved_ones() -> None:
    """As in torch, where ``lr`` and ``weight_decay`` of the constructor give way."""
    opt = updates(Annealed(), 1, lr=0.5, weight_decay=3.0, warmup=7, total_steps=4)[1]
    fresh = optimizer(total_steps=4)
    fresh.load_state_dict(opt.state_dict())
    (group,) = fresh.param_groups
    assert (group["lr"], group["weight_decay"], group["warmup"]) == (0.5, 3.0, 7)
    saved = opt.state_dict()
    saved["param_groups"][0] = {"params": [0]}  # a tool has left out the rest
    fresh = optimizer(total_steps=4)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == 1.0


# ---- the warm-up


def test_the_ramp_by_hand() -> None:
    rule = SGDRule(SGDConfig(lr=1.0))
    assert updates(rule, 6, warmup=4)[0] == pytest.approx([-0.25, -0.5, -0.75, -1, -1, -1])
    assert updates(rule, 2, warmup=4, lr=0.5)[0] == pytest.approx([-0.125, -0.25])
    assert updates(rule, 2, warmup=0)[0] == pytest.approx([-1, -1])
    assert updates(rule, 2)[0] == pytest.approx([-1, -1])  # classical rules ask for none


def test_tensors_that_thaw_later_have_a_ramp_of_their_own() -> None:
    opt = optimizer(2, SGDRule(SGDConfig(lr=1.0)), warmup=2)
    first, later = opt.param_groups[0]["params"]
    for step in range(4):
        step_with(opt, torch.ones(1), torch.ones(1) if step >= 3 else None)
    assert first.item() == pytest.approx(-3.5)
    assert later.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("value", [3.0, np.int64(3), torch.tensor(3)], ids=repr)
def test_warmup_is_a_whole_number(value: object) -> None:
    opt = updates(SGDRule(SGDConfig(lr=1.0)), 0, warmup=value)[1]
    assert more(opt, 3) == pytest.approx([-1 / 3, -2 / 3, -1])


@pytest.mark.parametrize("bad", [-1, 2.5, True, "5", math.inf])
def test_what_is_no_warmup(bad: object) -> None:
    with pytest.raises(ValueError, match="whole number of 0 or more, got"):
        optimizer(rule=SGDRule(), warmup=bad)


def test_weight_decay_is_not_warmed_up() -> None:
    param = Parameter(torch.ones(1))
    opt = LearnedOptimizer([param], descending_lstm(), warmup=100, weight_decay=100.0)
    step_with(opt, torch.zeros(1))
    assert param.item() == pytest.approx(0.9)


def test_the_first_updates_do_not_undo_a_layer() -> None:
    """Relative change of fresh weights after three equal gradients: Adam's is .06."""

    def change(**settings: Any) -> float:
        torch.manual_seed(0)
        weight = Parameter(torch.nn.Linear(128, 128).weight.detach().clone())
        start, grad = weight.detach().clone(), torch.randn(128, 128)
        opt = LearnedOptimizer([weight], "coordinatewise", **settings)
        for _ in range(3):
            step_with(opt, grad)
        return float((weight.detach() - start).norm() / start.norm())

    assert change() < 0.25
    assert change(warmup=0) > 1.0
