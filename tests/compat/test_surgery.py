"""Tools that reach into ``optimizer.state``: rows cut and appended, entries of wrappers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import flat, make_rule, small_net, train

KEEP = torch.arange(20) < 15

#: What tools do to every entry but the number of steps.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "prune": lambda v: v[KEEP],
    "prune the first": lambda v: v[5:],
    "append": lambda v: torch.cat((v, torch.zeros(4, *v.shape[1:]))),
    "prune and append": lambda v: torch.cat((v[KEEP], torch.zeros(2, *v.shape[1:]))),
    "reorder": lambda v: v[torch.arange(19, -1, -1)],
    "index": lambda v: v.index_select(0, torch.tensor([3, 3, 4])),
    "reset": torch.zeros_like,
    "clone": torch.clone,
    "nothing left": lambda v: v[:0],
}


def operate(opt: LearnedOptimizer, param: Parameter, cut: Callable[[Tensor], Tensor]) -> Parameter:
    """As densification does: pop the state, cut every entry but ``step``, swap the parameter."""
    state = opt.state.pop(param)
    for key, value in state.items():
        if key != "step":
            state[key] = cut(value)
    new = Parameter(cut(param.detach()))
    opt.param_groups[0]["params"], opt.state[new] = [new], state
    return new


def stepped(rule: UpdateRule, shape: tuple[int, ...] = (20, 3), n: int = 3, **settings):
    param = Parameter(torch.randn(shape))
    opt = LearnedOptimizer([param], rule, **settings)
    for _ in range(n):
        param.grad = torch.randn(shape)
        opt.step()
    return opt, param


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(20, 3), (20,), (20, 2, 2)])
def test_rows_can_be_cut_and_appended(rule: UpdateRule, cut: str, shape) -> None:
    opt, param = stepped(rule, shape)
    for _ in range(2):
        if param.shape[0] == 20:
            param = operate(opt, param, CUTS[cut])
        param.grad = torch.randn(param.shape)
        opt.step()
        assert torch.isfinite(param).all()
        for key, value in opt.state[param].items():
            assert key == "step" or value.shape[0] == param.shape[0]
    assert opt.state[param]["step"].item() == 5.0
    saved = copy.deepcopy(opt.state_dict())
    twin = LearnedOptimizer([Parameter(param.detach().clone())], rule)
    twin.load_state_dict(saved)
    param.grad = twin.param_groups[0]["params"][0].grad = torch.randn(param.shape)
    opt.step()
    twin.step()
    # Where the rows lie in memory decides the last bits of products.
    assert_close(param, twin.param_groups[0]["params"][0], rtol=1e-5, atol=1e-6)


def test_pruned_rows_are_missed_by_nobody_else(rule: UpdateRule) -> None:
    """Of a coordinatewise rule the other rows go on as before; the rest keeps its memory."""
    opt, param = stepped(rule)
    whole, other = copy.deepcopy((opt, param))
    param = operate(opt, param, lambda v: v[KEEP])
    for _ in range(2):
        grad = torch.randn(20, 3)
        other.grad, param.grad = grad, grad[KEEP]
        whole.step()
        opt.step()
    if rule.coordinatewise:
        assert_close(param.detach(), other.detach()[KEEP], rtol=1e-4, atol=1e-5)
    for key in rule.tensor_state:
        rows = opt.state[param][key]
        assert rows.shape[0] == 15
        assert (rows == rows[0]).all()


def test_in_place_tools_work_as_well() -> None:
    """Zeroing chosen rows in place: the moments of those rows; the tensor's memory is one."""
    opt, param = stepped(make_rule("horizon"))
    for key in ("fast", "slow", "square"):
        opt.state[param][key][torch.tensor([1, 2])] = 0.0
    param.grad = torch.randn(20, 3)
    opt.step()
    assert torch.isfinite(param).all()


def test_right_after_loading(rule: UpdateRule) -> None:
    opt, param = stepped(rule)
    fresh = LearnedOptimizer([param], rule)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    param = operate(fresh, param, CUTS["prune"])
    param.grad = torch.randn(15, 3)
    fresh.step()
    assert fresh.state[param]["step"].item() == 4.0


# ---- entries of wrappers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_wrappers_pass_through(rule: UpdateRule, dtype) -> None:
    """Untouched: dtype, bits, and what is no tensor, through a file and through casts."""
    model = small_net().to(dtype)
    opt = LearnedOptimizer(model.parameters(), rule)

    def step(optimizer: LearnedOptimizer) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step(opt)
    extras = {}
    for p in model.parameters():
        extras[p] = {
            "slow_copy": p.detach().double() / 3,
            "z": torch.full((), 2, dtype=torch.int64),
            "ema": 0.9,
            "name": "wrapped",
        }
        opt.state[p].update(extras[p])
    step(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh = LearnedOptimizer(model.parameters(), rule)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    step(fresh)
    for p, extra in extras.items():
        for key, value in extra.items():
            found = fresh.state[p][key]
            if isinstance(value, Tensor):
                assert found.dtype is value.dtype
                assert torch.equal(found, value)
            else:
                assert found == value


def test_a_wrapper_may_come_first(rule: UpdateRule) -> None:
    """Entries that are there before the first step neither stop the state nor are lost."""
    param = Parameter(torch.ones(3))
    opt = LearnedOptimizer([param], rule)
    opt.state[param]["z"] = torch.ones(3)
    param.grad = torch.ones(3)
    opt.step()
    assert opt.state[param]["step"].item() == 1.0
    assert torch.equal(opt.state[param]["z"], torch.ones(3))


def test_too_few_and_too_many_parameters_are_torchs_to_report(rule: UpdateRule) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    ours = LearnedOptimizer(params[:2], rule)
    for others, message in (
        ([{"params": params[:1]}], "doesn't match the size of optimizer's group"),
        ([{"params": params}], "doesn't match the size of optimizer's group"),
        ([{"params": params[:1]}, {"params": params[1:2]}], "different number of parameter groups"),
    ):
        other = LearnedOptimizer(others, make_rule("adam"))
        for p in params:
            p.grad = torch.ones(3)
        other.step()
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(other.state_dict())


# ---- one optimizer per parameter


@pytest.mark.parametrize("name", ["default", "default-fast"])
def test_an_optimizer_per_parameter_steps_as_one_of_all(name: str) -> None:
    together, apart = small_net(), small_net()
    one = LearnedOptimizer(together.parameters(), name)
    many = [LearnedOptimizer([p], name) for p in apart.parameters()]
    train(together, one, 5)

    class All(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            for opt in many:
                opt.step()

    train(apart, All(apart.parameters()), 5)
    assert_close(flat(apart), flat(together), rtol=1e-4, atol=1e-5)


def test_optimizer_in_backward() -> None:
    model = small_net()
    optimizers = {p: LearnedOptimizer([p], "default-fast") for p in model.parameters()}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    before = flat(model)
    model(torch.ones(2, 5)).square().mean().backward()
    assert not torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_linear_layer_trains_after_all_this() -> None:
    """The plainest use, so that no test above hides a step that does nothing."""
    model = nn.Linear(5, 3)
    opt = LearnedOptimizer(model.parameters())
    losses = train(model, opt, 100)
    assert losses[-1] < 0.5 * losses[0]
