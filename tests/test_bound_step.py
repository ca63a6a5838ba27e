"""A step bound to its tensors notices whatever is done to them between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_rule
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules import UpdateRule

needs_kernel = pytest.mark.skipif(
    not kernels.status().startswith("compiled"), reason=f"no compiled kernel: {kernels.status()}"
)
SHAPES = [(6, 6), (5,), (4, 3, 2)]
BEFORE, AFTER = 3, 3

Change = Callable[[LearnedOptimizer, list[nn.Parameter]], object]


def replace_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    opt.state[params[0]]["fast"] = torch.ones(6, 6, 1)


def replace_stats(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    opt.state[params[0]]["stats"] = 0.9 * opt.state[params[0]]["stats"]


def narrow_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    for key in ("fast", "slow", "square"):
        opt.state[params[1]][key].data = opt.state[params[1]][key].bfloat16()


def forget_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    del opt.state[params[1]]


def new_state(opt: LearnedOptimizer, params: list[nn.Parameter]) -> None:
    opt.state[params[1]] = {key: value.clone() for key, value in opt.state[params[1]].items()}


def set_data(index: int, change: Callable[[Tensor], Tensor]) -> Change:
    def run(_: LearnedOptimizer, params: list[nn.Parameter]) -> None:
        params[index].data = change(params[index].data)

    return run


def set_group(**values: Any) -> Change:
    return lambda opt, _: opt.param_groups[0].update(values)


def set_params(change: Callable[[list[nn.Parameter]], list[nn.Parameter]]) -> Change:
    def run(opt: LearnedOptimizer, _: object) -> None:
        opt.param_groups[0]["params"] = change(opt.param_groups[0]["params"])

    return run


CHANGES: dict[str, Change] = {
    "nothing": lambda *_: None,
    "transposed in place": set_data(0, Tensor.t),
    "other shape, same memory": set_data(0, lambda data: data.view(4, 9)),
    "other memory": set_data(0, Tensor.clone),
    "order": set_params(lambda params: params[::-1]),
    "fewer parameters": set_params(lambda params: params[:2]),
    "another parameter": set_params(lambda params: [*params, nn.Parameter(torch.ones(3))]),
    "state entry": replace_state,
    "statistics": replace_stats,
    "state's dtype": narrow_state,
    "no state": forget_state,
    "another state": new_state,
    "all state": lambda opt, _: opt.load_state_dict(opt.state_dict()),
    "rate": set_group(lr=0.3),
    "rate as a tensor": set_group(lr=torch.tensor(0.3)),
    "frozen": set_group(lr=0.0),
    "direction": set_group(maximize=True),
    "decay": set_group(weight_decay=30.0),
    "warm-up": set_group(warmup=40),
    "length of the run": set_group(total_steps=7),
}  # fmt: skip

#: What gradients may be, from those of contiguous tensors.
GRADS: dict[str, Callable[[int, Tensor], Tensor | None]] = {
    "usual": lambda _, grad: grad,
    "none of the first": lambda i, grad: grad if i else None,
    "none at all": lambda *_: None,
    "transposed": lambda _, grad: grad.t().contiguous().t() if grad.dim() == 2 else grad,
    "negated view": lambda _, grad: torch._neg_view(grad),
    "not finite": lambda _, grad: torch.full_like(grad, torch.nan),
}


def run(change: Change, kind: str, rule: UpdateRule) -> tuple[list[Tensor], LearnedOptimizer]:
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
    return [p.detach().clone() for p in params] + [v.clone() for v in state], opt


@pytest.fixture
def bound_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every bound step returned."""
    results: list[bool] = []
    bind = kernels.bind

    def recording(*arguments: Any, **keywords: Any) -> Any:
        step = bind(*arguments, **keywords)

        def recorded(*own: Any) -> bool:
            assert step is not None
            results.append(step(*own))
            return results[-1]

        return None if step is None else recorded

    monkeypatch.setattr(kernels, "bind", recording)
    return results


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "usual") for name in CHANGES), *(("nothing", k) for k in [*GRADS][1:])],
)
def test_changes_between_steps_are_noticed(
    name: str, kind: str, bound_steps: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = random_rule("horizon")
    bound, _ = run(CHANGES[name], kind, rule)
    assert bound_steps[:BEFORE] == [True] * BEFORE
    if (name, kind) == ("nothing", "usual"):
        assert bound_steps == [True] * (BEFORE + AFTER)
    monkeypatch.setattr(kernels, "bind", lambda *_, **__: None)
    unbound, _ = run(CHANGES[name], kind, rule)
    assert len(bound) == len(unbound)
    assert all(value.isfinite().all() for value in bound)
    assert all(map(torch.equal, bound, unbound))


@needs_kernel
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_rule_with_a_step_of_its_own_is_not_stepped_past(where: str) -> None:
    steps = []

    def step_(rule: UpdateRule, *arguments: Any, **keywords: Any) -> None:
        steps.append(len(arguments[0]))
        UpdateRule.step_(rule, *arguments, **keywords)

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


@needs_kernel
def test_no_step_is_taken_under_a_mode(bound_steps: list[bool]) -> None:
    opt = LearnedOptimizer([nn.Parameter(torch.ones(3))], random_rule("horizon"))
    param = opt.param_groups[0]["params"][0]
    param.grad = torch.ones(3)
    opt.step()
    opt.step()

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    with Mode():
        opt.step()
    assert bound_steps == [True, True, False]
    assert opt.state[param]["step"] == 3
