"""What PyTorch's own suite asks of every optimizer, asked of every rule.

The checks follow upstream's ``OptimizerInfo`` tests; the error inputs are upstream's own.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
)

from learned_optim import LearnedOptimizer
from learned_optim.rules import UpdateRule

from .common import descending_lstm, flat, make_rule, small_net, step_with, train

EXACT = {"rtol": 0, "atol": 0}
#: Schedulers of a run, and whether it maximizes.
RUNS = {
    "plain": ([], False),
    "maximize": ([], True),
    "plateau": ([lambda opt: ReduceLROnPlateau(opt, patience=2)], False),
    "chained": (
        [
            lambda opt: LinearLR(opt, start_factor=0.5, total_iters=4),
            lambda opt: ExponentialLR(opt, gamma=0.95),
        ],
        False,
    ),
    "cosine, maximize": ([lambda opt: CosineAnnealingLR(opt, T_max=40)], True),
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], Tensor]:
    """Weight, bias and input of upstream's linear problem, which every optimizer must improve."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(10, 5, generator=generator).to(dtype)
    bias = torch.rand(10, generator=generator).to(dtype)
    x = torch.rand(5, generator=generator).to(dtype)
    return [Parameter(weight), Parameter(bias)], x


def loss_of(params: list[Parameter], x: Tensor) -> Tensor:
    weight, bias = params
    return (weight.mv(x) + bias).pow(2).sum()


def step_with_random_grads(opt: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in opt.param_groups for p in group["params"]]
    step_with(opt, *(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params))


# ---- errors


@pytest.mark.parametrize("error_input", get_error_inputs_for_all_optims("cpu", torch.float32))
def test_upstreams_error_inputs(error_input) -> None:
    wanted = error_input.optimizer_error_input
    assert error_input.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = wanted.params if wanted.params is not None else [Parameter(torch.ones(1))]
    warns = error_input.error_type is UserWarning
    expected = pytest.warns if warns else pytest.raises
    with expected(error_input.error_type, match=error_input.error_regex):
        LearnedOptimizer(params, "default", **wanted.kwargs)


def test_sparse_gradients_are_refused_with_a_remedy() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = LearnedOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    before = flat(embedding)
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*SparseAdam"):
        opt.step()
    assert torch.equal(flat(embedding), before)


# ---- the right direction


@pytest.mark.parametrize("run", RUNS)
def test_goes_in_the_right_direction(descending: UpdateRule, run: str) -> None:
    params, x = problem()
    makers, maximize = RUNS[run]
    opt = LearnedOptimizer(params, descending, maximize=maximize)
    schedulers = [make(opt) for make in makers]
    initial = loss_of(params, x).item()
    for _ in range(20):
        opt.zero_grad()
        loss = loss_of(params, x)
        loss.backward()
        opt.step()
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.item())
            else:
                scheduler.step()
    final = loss_of(params, x).item()
    assert final > initial if maximize else final < initial


def test_groups_have_their_own_lr_and_weight_decay(rule: UpdateRule) -> None:
    """One optimizer with two groups does what two optimizers do."""
    start = [torch.randn(3, 2), torch.randn(4)]
    settings = [{"lr": 0.5, "weight_decay": 3.0}, {"lr": 2.0, "maximize": True}]
    together = [Parameter(t.clone()) for t in start]
    groups = [{"params": [p], **s} for p, s in zip(together, settings, strict=True)]
    one = LearnedOptimizer(groups, rule)
    for seed in range(5):
        step_with_random_grads(one, seed)
    apart = [Parameter(t.clone()) for t in start]
    each = [LearnedOptimizer([p], rule, **s) for p, s in zip(apart, settings, strict=True)]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for p, opt in zip(apart, each, strict=True):
            step_with(opt, torch.randn(p.shape, generator=generator))
    assert all(map(torch.equal, together, apart))


def test_add_param_group_takes_part_from_then_on() -> None:
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    opt = LearnedOptimizer([first], lr=0.5)
    opt.add_param_group({"params": [second], "weight_decay": 10.0})
    assert opt.param_groups[1]["lr"] == 0.5
    before = second.detach().clone()
    step_with_random_grads(opt)
    assert not torch.equal(second, before)
    with pytest.raises(ValueError, match="Invalid learning rate: -2"):
        opt.add_param_group({"params": [Parameter(torch.ones(1))], "lr": -2.0})


def test_a_loaded_group_can_be_removed() -> None:
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    opt = LearnedOptimizer([{"params": [first]}, {"params": [second]}])
    opt.load_state_dict(opt.state_dict())
    del opt.param_groups[1]
    opt.load_state_dict(opt.state_dict())
    step_with_random_grads(opt)
    assert [*opt.state] == [first]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_equals_float_lr(rule: UpdateRule, shape) -> None:
    results = []
    for lr in (0.3, torch.full(shape, 0.3, dtype=torch.float64)):
        params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(()))]
        opt = LearnedOptimizer(params, rule, lr=lr, weight_decay=0.5)
        for seed in range(5):
            step_with_random_grads(opt, seed)
        results.append(params)
    assert_close(*results, rtol=1e-6, atol=1e-7)


# ---- complex numbers


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), torch.complex64), ((7,), torch.complex128), ((4, 3), torch.complex64)]
)
def test_complex_parameters_are_pairs_of_reals(rule: UpdateRule, shape, dtype) -> None:
    start = torch.randn(shape, dtype=dtype)
    as_complex = Parameter(start.clone())
    as_real = Parameter(torch.view_as_real(start.clone()))
    opts = [LearnedOptimizer([p], rule, weight_decay=0.1) for p in (as_complex, as_real)]
    for _ in range(5):
        # A conjugate view is what autograd hands out for some complex operations.
        grad = torch.randn(shape, dtype=dtype).conj()
        step_with(opts[0], grad)
        step_with(opts[1], torch.view_as_real(grad.resolve_conj()))
    assert torch.equal(torch.view_as_real(as_complex.detach()), as_real.detach())
    assert_close(opts[0].state[as_complex], opts[1].state[as_real], **EXACT)


# ---- no-ops


def test_without_a_gradient_no_change_until_there_is_one(rule: UpdateRule) -> None:
    params, x = problem()
    opt = LearnedOptimizer(params, rule, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not opt.state
    params[0].requires_grad_(False)
    loss_of(params, x).backward()
    opt.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert [*opt.state] == [params[1]]
    params[0].requires_grad_(True)
    loss_of(params, x).backward()
    opt.step()
    assert not torch.equal(params[0], before[0])


def test_zero_gradients_no_change_where_promised(rule: UpdateRule) -> None:
    params, _ = problem()
    opt = LearnedOptimizer(params, rule)
    before = [p.detach().clone() for p in params]
    for _ in range(20):
        step_with(opt, *map(torch.zeros_like, params))
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert not (rule.zero_preserving and any(moved))


# ---- lr = 0: torch.distributed.checkpoint makes state appear by a step at lr = 0


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_at_lr_zero_creates_state_and_leaves_no_trace(rule: UpdateRule, lr) -> None:
    results = []
    for interlude in (False, True):
        params, x = problem()
        opt = LearnedOptimizer(params, rule, weight_decay=0.1)
        for step in range(6):
            if interlude and step in (0, 3):
                opt.param_groups[0]["lr"] = lr
                step_with(opt, *map(torch.zeros_like, params))
                assert all(opt.state[p] for p in params)
                opt.param_groups[0]["lr"] = 1.0
            opt.zero_grad()
            loss_of(params, x).backward()
            opt.step()
        results.append((params, opt.state_dict()["state"]))
    assert_close(*results, **EXACT)


# ---- state dicts


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"weight_decay": 0.1, "maximize": True}),
        (torch.float32, {"lr": torch.tensor(0.5)}),
        (torch.bfloat16, {"lr": 0.5}),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    rule: UpdateRule, dtype: torch.dtype, settings
) -> None:
    model, other, file = small_net().to(dtype), small_net(seed=1).to(dtype), io.BytesIO()
    opt = LearnedOptimizer(model.parameters(), rule, **settings)
    train(model, opt, 5)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["rule"] == {"name": rule.name, "fingerprint": rule.fingerprint()}
    other.load_state_dict(saved["model"])
    resumed = LearnedOptimizer(other.parameters(), rule, **settings)
    resumed.load_state_dict(saved["optimizer"])
    assert train(model, opt, 3) == train(other, resumed, 3)
    assert torch.equal(flat(model), flat(other))
    assert_close(opt.state_dict()["state"], resumed.state_dict()["state"], **EXACT)


def test_a_scheduler_resumes_with_the_optimizer() -> None:
    def build(seed: int = 0):
        model = small_net(seed)
        opt = LearnedOptimizer(model.parameters())
        warm, falling = LinearLR(opt, 0.1, total_iters=4), LambdaLR(opt, lambda step: 0.9**step)
        return model, opt, SequentialLR(opt, [warm, falling], milestones=[4])

    def advance(parts, steps: int) -> list[float]:
        model, opt, scheduler = parts
        losses = []
        for _ in range(steps):
            losses += train(model, opt, 1)
            scheduler.step()
        return losses

    whole, first, second = advance(build(), 10), build(), build(seed=1)
    begun = advance(first, 6)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    assert begun + advance(second, 4) == whole


def test_loading_copies_so_that_two_optimizers_share_nothing(rule: UpdateRule) -> None:
    params, _ = problem()
    opt = LearnedOptimizer(params, rule)
    step_with_random_grads(opt)
    saved = opt.state_dict()
    other = LearnedOptimizer([Parameter(p.detach().clone()) for p in params], rule)
    other.load_state_dict(saved)
    snapshot = copy.deepcopy(saved["state"])
    step_with_random_grads(other)
    assert_close(saved["state"], snapshot, **EXACT)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="optimizers take named parameters from torch 2.6 on",
)
def test_named_and_unnamed_state_dicts_load_into_each_other() -> None:
    rule = make_rule("lstm")
    named_params, _ = problem()
    plain_params, _ = problem()
    named = LearnedOptimizer(zip(("weight", "bias"), named_params, strict=True), rule)
    plain = LearnedOptimizer(plain_params, rule)
    step_with_random_grads(named)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())
    assert_close(plain.state_dict()["state"], named.state_dict()["state"], **EXACT)
    fresh = LearnedOptimizer(zip(("a", "b"), problem()[0], strict=True), rule)
    unnamed = plain.state_dict()
    unnamed["param_groups"][0].pop("param_names", None)
    fresh.load_state_dict(unnamed)
    assert fresh.param_groups[0]["param_names"] == ["a", "b"]
    step_with_random_grads(fresh)


def test_a_step_count_that_is_a_number_loads() -> None:
    params, _ = problem()
    opt = LearnedOptimizer(params)
    step_with_random_grads(opt)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    fresh = LearnedOptimizer(params)
    fresh.load_state_dict(saved)
    step_with_random_grads(fresh)
    assert all(state["step"].item() == 2.0 for state in fresh.state.values())


def test_state_of_another_rule_is_refused_before_anything_changes() -> None:
    params, _ = problem()
    ours = LearnedOptimizer(params, descending_lstm())
    step_with_random_grads(ours)
    before = copy.deepcopy(ours.state_dict())
    other = LearnedOptimizer(params, make_rule("adam"))
    step_with_random_grads(other)
    with pytest.raises(ValueError, match=r"update rule 'adam'.*runs 'lstm'"):
        ours.load_state_dict(other.state_dict())
    adam = torch.optim.Adam(params)
    step_with_random_grads(adam)
    with pytest.raises(ValueError, match=r"belongs to another optimizer: its groups have .*betas"):
        ours.load_state_dict(adam.state_dict())
    bare = {**adam.state_dict(), "param_groups": ours.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"does not fit the update rule 'lstm'.*exp_avg"):
        ours.load_state_dict(bare)
    smaller = LearnedOptimizer([Parameter(torch.ones(3, 5)), params[1]], descending_lstm())
    step_with_random_grads(smaller)
    with pytest.raises(ValueError, match=r"parameter of shape \(10, 5\)"):
        ours.load_state_dict(smaller.state_dict())
    assert ours.state_dict()["param_groups"] == before["param_groups"]
    assert_close(ours.state_dict()["state"], before["state"], **EXACT)


# ---- hooks


def test_step_hooks_run_around_the_step() -> None:
    param = Parameter(torch.ones(2))
    opt = LearnedOptimizer([param])
    order = []
    handles = [
        opt.register_step_pre_hook(lambda *_: order.append(("pre", param[0].item() == 1.0))),
        opt.register_step_post_hook(lambda *_: order.append(("post", param[0].item() == 1.0))),
        register_optimizer_step_pre_hook(lambda *_: order.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("all post")),
    ]
    try:
        step_with(opt, torch.ones(2))
    finally:
        for handle in handles:
            handle.remove()
    opt.step()
    assert order == ["all pre", ("pre", True), ("post", False), "all post"]


def test_state_dict_hooks() -> None:
    """A hook before loading may edit; one after it finds the saved bits restored."""
    params = [Parameter(torch.ones(3, dtype=torch.bfloat16))]
    opt = LearnedOptimizer(params, lr=0.7)
    step_with_random_grads(opt)
    calls, seen = [], []
    opt.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    opt.register_state_dict_post_hook(lambda *_: calls.append("first post"), prepend=True)
    saved = copy.deepcopy(opt.state_dict())
    assert calls == ["pre", "first post"]
    assert saved["mine"] == 1

    def edit(_, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.25
        return state_dict

    def look(loaded):
        seen.append({k: v.clone() for k, v in loaded.state_dict()["state"][0].items()})

    fresh = LearnedOptimizer(params)
    fresh.register_load_state_dict_pre_hook(edit)
    fresh.register_load_state_dict_post_hook(look, prepend=True)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == 0.25
    assert_close(seen[0], saved["state"][0], **EXACT)


# ---- copies


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_model_and_optimizer_copied_together_go_on_alike(rule: UpdateRule, make_copy) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), rule, state_dtype=torch.bfloat16)
    train(model, opt, 3)
    model2, opt2 = make_copy((model, opt))
    assert opt2.rule is not opt.rule
    assert opt2.state_dtype is torch.bfloat16
    assert train(model, opt, 3) == train(model2, opt2, 3)
    assert torch.equal(flat(model), flat(model2))


def test_the_callers_rule_is_neither_changed_nor_followed() -> None:
    rule = make_rule("lstm").train()
    opt = LearnedOptimizer([Parameter(torch.ones(2))], rule)
    assert rule.training
    assert all(w.requires_grad for w in rule.parameters())
    assert not any(w.requires_grad for w in opt.rule.parameters())
    before = opt.rule.fingerprint()
    with torch.no_grad():
        for weight in (*rule.parameters(), *opt.rule.parameters()):
            weight.add_(1.0)
    assert opt.rule.fingerprint() == before


# ---- closures


def test_closure_runs_with_gradients_and_its_loss_comes_back(descending: UpdateRule) -> None:
    params, x = problem()
    opt = LearnedOptimizer(params, descending)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(params, x)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(10)]
    assert calls == [True] * 10
    assert losses[-1] < losses[0]
    assert opt.step() is None
