"""A step bound to its tensors notices whatever is done to them between steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_rule
from test_kernels import needs_kernel
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules import UpdateRule

pytestmark = needs_kernel
SHAPES = [(6, 6), (5,), (4, 3, 2)]
BEFORE, AFTER = 3, 3

Change = Callable[[LearnedOptimizer, list[nn.Parameter]], object]


def set_state(index: int, **changes: Callable[[Tensor], Tensor]) -> Change:
    def change(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
        state = opt.state[params[index]]
        state.update({key: value(state[key]) for key, value in changes.items()})

    return change


def narrow_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    for key in ("fast", "slow", "square"):
        opt.state[params[1]][key].data = opt.state[params[1]][key].bfloat16()


def new_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    opt.state[params[1]] = {key: value.clone() for key, value in opt.state[params[1]].items()}


def set_data(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, params: setattr(params[0], "data", change(params[0].data))


def set_group(**values: Any) -> Change:
    return lambda opt, _: opt.param_groups[0].update(values)


def set_params(change: Callable[[list[nn.Parameter]], list[nn.Parameter]]) -> Change:
    return lambda opt, params: opt.param_groups[0].update(params=change(params))


CHANGES: dict[str, Change] = {
    "nothing": lambda *_: None,
    "transposed in place": set_data(Tensor.t),
    "other shape, same memory": set_data(lambda data: data.view(4, 9)),
    "other memory": set_data(Tensor.clone),
    "order": set_params(lambda params: params[::-1]),
    "fewer parameters": set_params(lambda params: params[:2]),
    "another parameter": set_params(lambda params: [*params, nn.Parameter(torch.ones(3))]),
    "state entry": set_state(0, fast=torch.ones_like),
    "statistics": set_state(0, stats=lambda stats: 0.9 * stats),
    "state's dtype": narrow_state,
    "no state": lambda opt, params: opt.state.pop(params[1]),
    "another state": new_state,
    "all state": lambda opt, _: opt.load_state_dict(opt.state_dict()),
    "rate": set_group(lr=0.3),
    "rate as a tensor": set_group(lr=torch.tensor(0.3)),
    "frozen": set_group(lr=0.0),
    "direction": set_group(maximize=True),
    "decay": set_group(weight_decay=30.0),
    "warm-up": set_group(warmup=40),
    "length of the run": set_group(total_steps=7),
}

#: Gradients after the change, from contiguous ones.
GRADS: dict[str, Callable[[int, Tensor], Tensor | None]] = {
    "usual": lambda _, grad: grad,
    "none of the first": lambda i, grad: grad if i else None,
    "none at all": lambda *_: None,
    "transposed": lambda _, grad: grad.t().contiguous().t() if grad.dim() == 2 else grad,
    "negated view": lambda _, grad: torch._neg_view(grad),
    "not finite": lambda _, grad: torch.full_like(grad, torch.nan),
}


def run(change: Change, kind: str, rule: UpdateRule) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]
    opt = LearnedOptimizer(params, rule, total_steps=20)
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            change(opt, params)
        for index, param in enumerate(opt.param_groups[0]["params"]):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = GRADS[kind](index, grad) if step >= BEFORE else grad
        opt.step()
    state = [v for p in params for v in opt.state[p].values()]
    return [p.detach().clone() for p in params] + [v.clone() for v in state]


@pytest.fixture
def bound_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a bound step made the step."""
    results: list[bool] = []
    call = kernels.BoundStep.__call__

    def recorded(*arguments: Any) -> bool:
        results.append(call(*arguments))
        return results[-1]

    monkeypatch.setattr(kernels.BoundStep, "__call__", recorded)
    return results


@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "usual") for name in CHANGES), *(("nothing", k) for k in [*GRADS][1:])],
)
def test_changes_between_steps_are_noticed(
    name: str, kind: str, bound_steps: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = random_rule("horizon")
    bound = run(CHANGES[name], kind, rule)
    assert bound_steps[:BEFORE] == [True] * BEFORE
    if (name, kind) == ("nothing", "usual"):
        assert bound_steps == [True] * (BEFORE + AFTER)
    monkeypatch.setattr(kernels, "bind", lambda *_: None)
    unbound = run(CHANGES[name], kind, rule)
    assert len(bound) == len(unbound)
    assert all(value.isfinite().all() for value in bound)
    assert all(map(torch.equal, bound, unbound))


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_rule_with_a_step_of_its_own_is_not_stepped_past(where: str) -> None:
    steps = []

    def step_(rule: UpdateRule, *arguments: Any) -> None:
        steps.append(len(arguments[0]))
        UpdateRule.step_(rule, *arguments)

    rule = random_rule("horizon")
    if where == "class":
        rule.__class__ = type("Overridden", (type(rule),), {"step_": step_, "name": ""})
    else:
        rule.step_ = step_.__get__(rule)  # type: ignore[method-assign]
    opt = LearnedOptimizer([nn.Parameter(torch.ones(3))], rule)
    for _ in range(3):
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
        opt.step()
    assert steps == [1, 1, 1]


def test_no_bound_step_is_made_under_a_mode(bound_steps: list[bool]) -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LearnedOptimizer([param], random_rule("horizon"))
    param.grad = torch.ones(3)
    opt.step()
    with BaseTorchFunctionMode():
        opt.step()
    assert bound_steps == [True, False]
    assert opt.state[param]["step"] == 2
