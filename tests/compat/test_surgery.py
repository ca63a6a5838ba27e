"""Tools that reach into ``optimizer.state``: rows cut and appended, entries of wrappers."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import flat, make_rule, small_net, step_with, train

KEEP = torch.arange(20) < 15

#: What tools do to every entry but the number of steps.
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "prune": lambda v: v[KEEP],
    "prune and append": lambda v: torch.cat((v[KEEP], torch.zeros(2, *v.shape[1:]))),
    "append": lambda v: torch.cat((v, torch.zeros(4, *v.shape[1:]))),
    "reorder": lambda v: v[torch.arange(19, -1, -1)],
    "reset": torch.zeros_like,
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


def stepped(rule: UpdateRule, shape: tuple[int, ...] = (20, 3), **settings):
    param = Parameter(torch.randn(shape))
    opt = LearnedOptimizer([param], rule, **settings)
    for _ in range(3):
        step_with(opt, torch.randn(shape))
    return opt, param


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(20, 3), (20,)])
def test_rows_can_be_cut_and_appended(rule: UpdateRule, cut: str, shape) -> None:
    opt, param = stepped(rule, shape)
    param = operate(opt, param, CUTS[cut])
    for _ in range(2):
        step_with(opt, torch.randn(param.shape))
        assert torch.isfinite(param).all()
        for key, value in opt.state[param].items():
            assert key == "step" or value.shape[0] == param.shape[0]
    assert opt.state[param]["step"].item() == 5.0
    saved = copy.deepcopy(opt.state_dict())
    twin = LearnedOptimizer([Parameter(param.detach().clone())], rule)
    twin.load_state_dict(saved)
    grad = torch.randn(param.shape)
    step_with(opt, grad)
    step_with(twin, grad)
    # Where the rows lie in memory decides the last bits of products.
    assert_close(param, twin.param_groups[0]["params"][0], rtol=1e-5, atol=1e-6)


def test_other_rows_do_not_notice_the_pruned_ones(rule: UpdateRule) -> None:
    """Also right after loading."""
    opt, param = stepped(rule)
    whole, other = copy.deepcopy((opt, param))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    param = operate(opt, param, CUTS["prune"])
    for _ in range(2):
        grad = torch.randn(20, 3)
        step_with(whole, grad)
        step_with(opt, grad[KEEP])
    if rule.coordinatewise:
        assert_close(param.detach(), other.detach()[KEEP], rtol=1e-4, atol=1e-5)
    for key in rule.tensor_state:
        rows = opt.state[param][key]
        assert rows.shape[0] == 15
        assert (rows == rows[0]).all()


# ---- matrices of the default's eigenbasis


def test_matrices_are_saved_once_in_their_own_dtype() -> None:
    opt, _ = stepped(make_rule("checkpoint:eigenbasis"), state_dtype=torch.bfloat16)
    saved = opt.state_dict()["state"][0]
    assert saved["fast"].dtype is torch.bfloat16
    for key in ("col_basis", "col_cov"):
        assert saved[key].shape == (3, 3)
        assert saved[key].dtype is torch.float32


@pytest.mark.parametrize("cut", ["prune", "append", "reorder"])
def test_matrices_that_fit_no_longer_start_anew(cut: str) -> None:
    opt, param = stepped(make_rule("checkpoint:eigenbasis"), (20, 8))
    before = opt.state_dict()["state"][0]["col_cov"].clone()
    param = operate(opt, param, CUTS[cut])
    step_with(opt, torch.zeros_like(param))
    state = opt.state_dict()["state"][0]
    ratio = state["col_cov"] / before  # of a zero gradient, covariances only decay
    assert_close(ratio, ratio[0, 0].expand(8, 8), rtol=1e-4, atol=0)
    assert state["row_cov"].shape == (len(param), len(param))


def test_matrices_that_are_missing_or_misshapen_start_anew() -> None:
    rule = make_rule("checkpoint:eigenbasis")
    opt, param = stepped(rule)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["col_basis"]
    saved["state"][0]["col_cov"] = torch.ones(4, 4)
    loaded = LearnedOptimizer([Parameter(param.detach().clone())], rule)
    loaded.load_state_dict(saved)
    state = loaded.state_dict()["state"][0]
    assert torch.equal(state["col_basis"], torch.eye(3))
    assert torch.equal(state["col_cov"], torch.zeros(3, 3))
    del opt.state[param]["col_basis"]  # a tool takes it away
    step_with(opt, torch.randn(20, 3))
    assert opt.state_dict()["state"][0]["col_basis"].shape == (3, 3)


# ---- entries of wrappers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_wrappers_pass_through(rule: UpdateRule, dtype) -> None:
    """Untouched: dtype, bits, and what is no tensor, through a file and through casts."""
    param = Parameter(torch.ones(3, 2, dtype=dtype))
    opt = LearnedOptimizer([param], rule)
    extra = {
        "slow_copy": param.detach().double() / 3,
        "z": torch.full((), 2, dtype=torch.int64),
        "ema": 0.9,
        "name": "wrapped",
    }
    opt.state[param].update(extra)  # before the first step: the rule's entries come beside them
    for _ in range(2):
        step_with(opt, torch.ones_like(param))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh = LearnedOptimizer([param], rule)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh.step()
    assert fresh.state[param]["step"].item() == 3.0
    for key, value in extra.items():
        found = fresh.state[param][key]
        if isinstance(value, Tensor):
            assert found.dtype is value.dtype
            assert torch.equal(found, value)
        else:
            assert found == value


def test_too_few_and_too_many_parameters_are_torchs_to_report() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    ours = LearnedOptimizer(params[:2])
    for others, message in (
        ([{"params": params[:1]}], "doesn't match the size of optimizer's group"),
        ([{"params": params}], "doesn't match the size of optimizer's group"),
        ([{"params": params[:1]}, {"params": params[1:2]}], "different number of parameter groups"),
    ):
        other = LearnedOptimizer(others, make_rule("adam"))
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(other.state_dict())


def test_an_optimizer_per_parameter_in_backward_steps_as_one_of_all() -> None:
    together, apart = small_net(), small_net()
    train(together, LearnedOptimizer(together.parameters(), "default-fast"), 5)
    optimizers = {p: LearnedOptimizer([p], "default-fast") for p in apart.parameters()}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for p in apart.parameters():
        p.register_post_accumulate_grad_hook(hook)
    train(apart, torch.optim.SGD(apart.parameters(), lr=0.0), 5)
    assert_close(flat(apart), flat(together), rtol=1e-4, atol=1e-5)
