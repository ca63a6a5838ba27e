"""The guard: what it sees in a sequence of losses, and what the optimizer makes of it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.testing import assert_close

from learned_optim import Guard, LearnedOptimizer, save_rule
from learned_optim._guarded import GuardedRule
from learned_optim.guard import GuardAction, GuardState
from learned_optim.rules import UpdateRule
from learned_optim.rules.classical import SGDConfig, SGDRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule
from learned_optim.rules.lstm import LSTMConfig, LSTMRule

from .common import descending_lstm, flat, make_rule, small_batch, small_net

#: Short enough for tests of a few hundred steps.
QUICK = Guard(lr=1e-2, window=10, patience=50, length=40)


def show(losses: list[float], guard: Guard = QUICK) -> tuple[GuardState, list[GuardAction]]:
    """What a fresh guard says to a sequence of losses."""
    watch = GuardState()
    return watch, [watch.observe(loss, guard) for loss in losses]


def noisy(level: float, n: int, noise: float = 0.1, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + noise * torch.randn(n, generator=generator, dtype=torch.float64)).tolist()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Training with a closure on minibatches of 32, seeded by the step; the losses."""
    x, y = small_batch(n=256)
    losses = []

    def closure() -> Tensor:
        rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(len(losses)))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


def random_lstm() -> LSTMRule:
    """Weights so large that updates are of the order of ten, in directions of no meaning."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        rule = LSTMRule(LSTMConfig())
        with torch.no_grad():
            for weight in rule.parameters():
                weight.normal_(0.0, 3.0)
    return rule


BAD_RULES: dict[str, Callable[[], UpdateRule]] = {
    "sgd with a huge learning rate": lambda: SGDRule(SGDConfig(lr=1e4)),
    "random lstm": random_lstm,
    "ascending": lambda: descending_lstm(step=-0.5),
}


# ---- what the guard sees in losses


@given(st.floats(0.0, 0.02), st.floats(0.001, 0.3), st.floats(-3.0, 3.0), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_a_noisy_loss_that_falls_is_left_alone(slope, noise, offset, seed) -> None:
    """From twenty times the noise down to nothing, at any slope, whatever the minimum."""
    noise_of = noisy(0.0, 400, noise, seed)
    start = 20 * noise + abs(offset)
    losses = [
        offset + start * math.exp(-0.005 * t) - slope * noise * t / 10 + e
        for t, e in enumerate(noise_of)
    ]
    watch, verdicts = show(losses)
    assert watch.interventions == 0
    assert set(verdicts) == {GuardAction.LEARNED, GuardAction.SNAPSHOT}


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    losses = noisy(2.0, 30) + noisy(1.0, 30) + noisy(1.5, 20) + noisy(1.2, 100)
    _, plain = show(losses)
    watch, scaled = show([scale * loss for loss in losses])
    assert scaled == plain
    assert watch.interventions >= 1


def test_a_rise_is_noticed_within_a_window() -> None:
    watch, verdicts = show(noisy(2.0, 10) + noisy(1.0, 10) + noisy(1.6, 10))
    assert verdicts[:20] == [
        *[
            GuardAction.SNAPSHOT,
            *[GuardAction.LEARNED] * 8,
            GuardAction.SNAPSHOT,
        ],  # the first loss; a better window
        *[*[GuardAction.LEARNED] * 9, GuardAction.SNAPSHOT],
    ]
    assert GuardAction.RESTORE in verdicts[20:]
    assert watch.interventions == 1


def test_an_explosion_is_noticed_at_the_second_loss() -> None:
    for explosion in (1e6, math.inf, math.nan, -math.inf, 1e300):
        _, verdicts = show([*noisy(2.0, 10), *noisy(1.0, 10), *[explosion] * 4])
        assert verdicts.index(GuardAction.RESTORE) == 21, explosion
        _, verdicts = show([2.3, *[explosion] * 4])
        assert verdicts.index(GuardAction.RESTORE) == 2, explosion


@pytest.mark.parametrize("bad", [1e6, math.inf, math.nan])
def test_one_bad_loss_is_no_rise(bad: float) -> None:
    watch, verdicts = show([*noisy(2.0, 10), bad, *noisy(1.0, 10), bad, *noisy(0.9, 50), bad])
    assert watch.interventions == 0
    assert GuardAction.RESTORE not in verdicts
    assert all(math.isfinite(v) for v in vars(watch).values())


def test_before_the_first_finite_loss_nothing_is_known() -> None:
    watch, verdicts = show([math.nan] * 60)
    assert set(verdicts) == {GuardAction.LEARNED}
    assert watch.observe(1.0, QUICK) is GuardAction.SNAPSHOT
    assert watch.steps == 61


def test_a_stall_is_noticed_after_patience_steps() -> None:
    _, verdicts = show([*[3.0] * 50, *[1.0] * 100])
    assert verdicts.index(GuardAction.RESTORE) == 49  # no better than the first loss
    _, verdicts = show([3.0, *[1.0] * 200])
    assert verdicts.index(GuardAction.RESTORE) == 149  # the first loss is part of the first average


def test_where_no_window_was_better_than_the_first_loss_the_start_is_kept() -> None:
    _, verdicts = show([2.3, *[8.0] * 3, *noisy(2.44, 46)])
    kept = [t for t, verdict in enumerate(verdicts) if verdict is GuardAction.SNAPSHOT]
    assert kept == [0]
    assert verdicts.index(GuardAction.RESTORE) == QUICK.patience - 1


def test_a_window_that_ends_badly_is_not_kept() -> None:
    _, verdicts = show(noisy(2.0, 10, 0.01) + noisy(1.0, 9, 0.01) + [2.5])
    assert verdicts[-1] is GuardAction.LEARNED


def test_interventions_double_until_the_rule_succeeds() -> None:
    """A rule that always fails leaves all but a few steps to Adam."""
    watch = GuardState()
    lengths, run = [], 0
    for _ in range(3000):
        verdict = watch.observe(1.0 if watch.remaining else 50.0 if watch.steps else 1.0, QUICK)
        run = run + 1 if verdict is GuardAction.ADAM else 0
        if verdict is GuardAction.SNAPSHOT:
            lengths.append(watch.adam_steps - sum(lengths))
    assert lengths == [0, 40, 80, 160, 320, 640, 1280]
    assert watch.interventions == 7
    assert 3000 - watch.adam_steps < 7 * QUICK.window
    # A span of patience steps below Adam's last window earns the trust back.
    while watch.remaining:
        watch.observe(1.0, QUICK)
    assert watch.longer == 2**7
    for _ in range(QUICK.patience):
        watch.observe(0.5, QUICK)
    assert watch.longer == 1


def test_after_adam_the_rule_is_measured_against_adam() -> None:
    """Data that became harder for good do not keep the rule out for good."""
    losses = noisy(2.0, 10) + noisy(1.0, 20) + [5.0] * 2 + noisy(5.0, 41)
    watch, verdicts = show(losses)
    assert verdicts.index(GuardAction.RESTORE) == 31
    assert verdicts[32:-1] == [GuardAction.ADAM] * QUICK.length
    assert verdicts[-1] is GuardAction.SNAPSHOT
    assert watch.best == pytest.approx(5.0, abs=0.1)
    later = [watch.observe(loss, QUICK) for loss in noisy(4.8, 50, seed=1)]
    assert GuardAction.RESTORE not in later


# ---- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, r"positive learning rate for Adam, got lr=0\.0"),
        ({"lr": math.nan}, "got lr=nan"),
        ({"tolerance": -0.1}, r"got tolerance=-0\.1"),
        ({"tolerance": math.inf}, "got tolerance=inf"),
        ({"window": 1}, "at least 2 steps, got window=1"),
        ({"patience": 49}, "patience=49 is shorter: pass a larger patience or a smaller window"),
        ({"length": 10}, "length=10 is shorter"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**wrong)  # type: ignore[arg-type]


def test_a_guard_is_true_or_a_guard() -> None:
    params = [Parameter(torch.ones(1))]
    assert LearnedOptimizer(params, descending_lstm(), guard=True).guard == Guard()
    assert LearnedOptimizer(params, descending_lstm(), guard=QUICK).guard is QUICK
    with pytest.raises(TypeError, match=r"must be True or a learned_optim\.Guard, got 0\.001"):
        LearnedOptimizer(params, descending_lstm(), guard=1e-3)  # type: ignore[arg-type]


# ---- off, and on with nothing to do


@pytest.mark.parametrize("off", [None, False])
def test_off_it_leaves_no_trace(rule: UpdateRule, off: bool | None) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), rule, guard=off)
    train(model, opt, 2)
    assert opt.guard is None
    assert opt.guard_report is None
    saved = opt.state_dict()
    assert saved.keys() == {"state", "param_groups", "rule"}
    assert saved["param_groups"][0].keys() == {
        *("lr", "weight_decay", "maximize", "total_steps", "warmup", "params")
    }
    own = rule.init_state(torch.zeros(2)).keys()
    assert all(state.keys() == {"step", *own} for state in saved["state"].values())


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 1.0, "state_dtype": torch.bfloat16}])
def test_a_good_rule_is_left_alone(descending: UpdateRule, settings: dict[str, Any]) -> None:
    results = []
    for guard in (None, True):
        model = small_net()
        opt = LearnedOptimizer(model.parameters(), descending, guard=guard, **settings)
        train(model, opt, 120)
        results.append(flat(model))
    assert torch.equal(*results)
    assert opt.guard_report == {"steps": 120, "interventions": 0, "adam_steps": 0, "active": 0}


# ---- bad rules


@pytest.mark.parametrize("name", BAD_RULES)
def test_a_bad_checkpoint_ends_near_adam(name: str, tmp_path: Path) -> None:
    """From a file, as it would be used: 500 steps, in which Adam alone gets to 0.05."""
    file = tmp_path / "bad.safetensors"
    save_rule(BAD_RULES[name](), file)
    last = {}
    for guard in (None, QUICK):
        model = small_net()
        opt = LearnedOptimizer(model.parameters(), file, guard=guard)
        last[guard] = sum(train(model, opt, 500)[-50:]) / 50
    report = opt.guard_report
    model = small_net()
    adam = sum(train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 500)[-50:]) / 50
    assert adam < 0.1
    assert last[None] > 10.0
    assert last[QUICK] < 1.5 * adam
    assert report["steps"] == 500
    assert 1 <= report["interventions"] <= 4  # 40 + 80 + 160 + ...
    assert report["adam_steps"] > 400
    assert report["active"] == 1


@pytest.mark.parametrize("lr", [1.0, 0.3, torch.tensor(0.3)])
def test_an_intervention_is_adam_from_the_kept_parameters(lr: float | Tensor) -> None:
    model, reference = small_net(), small_net()
    opt = LearnedOptimizer(model.parameters(), SGDRule(SGDConfig(lr=1e4)), lr=lr, guard=QUICK)
    adam = torch.optim.Adam(reference.parameters(), lr=QUICK.lr * float(lr))
    x, y = small_batch()
    compared = 0
    for _ in range(40):
        before = opt.guard_report
        for net, optimizer in ((model, opt), (reference, adam)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        opt.step(lambda: nn.functional.cross_entropy(model(x), y))
        if opt.guard_report["interventions"] > before["interventions"]:
            assert torch.equal(flat(model), flat(small_net()))
        if opt.guard_report["adam_steps"] > before["adam_steps"]:
            adam.step()
            assert_close(flat(model), flat(reference), rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_going_back_is_exact_in_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Also with half-precision state, also for parameters that are not contiguous."""
    start = torch.randn(shape, dtype=dtype)
    params = [Parameter(start.clone()), Parameter(start.clone().t())]
    rule = descending_lstm(step=5.0)
    opt = LearnedOptimizer(params, rule, state_dtype=torch.bfloat16, guard=QUICK)
    for step in range(3):
        assert step == 0 or not start.numel() or not torch.equal(params[0], start)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step(lambda step=step: 1000.0 if step else 1.0)
    assert opt.guard_report["interventions"] == 1
    for p, value in zip(params, (start, start.t()), strict=True):
        assert torch.equal(p, value)
        state = opt.state[p]
        assert state["guard_snapshot"].dtype == torch.zeros((), dtype=dtype).real.dtype
        assert state["guard_first_moment"].dtype is torch.float32
        assert p.dim() == 0 or state["hidden"].dtype is torch.bfloat16
        assert state["step"].item() == 2.0
        fresh = opt._init_state(p)
        assert all(torch.equal(state[key], fresh[key]) for key in fresh if key != "step")


def test_a_loss_that_is_nan_changes_nothing_but_the_count() -> None:
    """Gradients of such a batch count as zero, and the guard sits it out."""
    results = []
    for bad in (math.nan, None):
        model = small_net()
        opt = LearnedOptimizer(model.parameters(), SGDRule(SGDConfig(lr=0.3)), guard=QUICK)
        train(model, opt, 5)
        if bad is not None:
            for p in model.parameters():
                p.grad = torch.full_like(p, bad)
            opt.step(lambda bad=bad: bad)
        train(model, opt, 100)
        results.append(flat(model))
        assert opt.guard_report["interventions"] == 0
    assert torch.equal(*results)


# ---- the optimizer's own habits under a guard


def test_maximizing_is_minimizing_the_negative() -> None:
    results = []
    for sign in (1.0, -1.0):
        param = Parameter(torch.tensor([1.0, -2.0]))
        rule = SGDRule(SGDConfig(lr=3.0))
        opt = LearnedOptimizer([param], rule, maximize=sign < 0, guard=QUICK)

        def closure(opt=opt, param=param, sign=sign) -> Tensor:
            opt.zero_grad()
            loss = sign * param.square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            opt.step(closure)
        results.append(param.detach())
        assert opt.guard_report["interventions"] > 0
    assert torch.equal(*results)


def test_one_loss_has_one_direction() -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    groups = [{"params": params[:1]}, {"params": params[1:], "maximize": True}]
    with pytest.raises(ValueError, match="give each direction an optimizer of its own"):
        LearnedOptimizer(groups, descending_lstm(), guard=True)
    LearnedOptimizer(groups, descending_lstm())


def test_a_missing_closure_is_an_error_that_names_the_remedy() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm(), guard=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = flat(model)
    with pytest.raises(ValueError, match=r"step\(lambda: loss\) after loss\.backward\(\)"):
        opt.step()
    assert torch.equal(flat(model), before)
    assert opt.guard_report["steps"] == 0


def test_a_frozen_group_stays_where_it_is() -> None:
    frozen, free = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    groups = [{"params": [frozen], "lr": 1.0}, {"params": [free]}]
    opt = LearnedOptimizer(groups, descending_lstm(step=5.0), guard=QUICK)
    losses = iter([1.0, 1.0, *[1000.0] * 20])
    for step in range(10):
        for p in (frozen, free):
            p.grad = torch.ones_like(p)
        if step == 2:
            opt.param_groups[0]["lr"] = 0.0
            where = frozen.detach().clone()
        opt.step(lambda: next(losses))
    assert opt.guard_report["interventions"] == 1
    assert torch.equal(frozen, where)
    assert not torch.equal(where, torch.ones(2))


def test_steps_at_lr_zero_need_no_loss_and_are_not_counted() -> None:
    results = []
    for interlude in (False, True):
        model = small_net(seed=1)
        opt = LearnedOptimizer(model.parameters(), BAD_RULES["ascending"](), guard=QUICK)
        if interlude:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            opt.param_groups[0]["lr"] = 0.0
            opt.step()
            opt.param_groups[0]["lr"] = 1.0
        model.load_state_dict(small_net().state_dict())  # after the state came into being
        train(model, opt, 30)
        results.append(flat(model))
        assert opt.guard_report["steps"] == 30
        assert opt.guard_report["interventions"] == 1
    assert torch.equal(*results)


def test_groups_and_parameters_that_come_later() -> None:
    first, second, idle = (Parameter(torch.ones(2)) for _ in range(3))
    opt = LearnedOptimizer([first, idle], descending_lstm(step=5.0), guard=QUICK)
    losses = iter([1.0, 1.0, 1.0, *[1000.0] * 20])
    for step in range(8):
        if step == 2:
            opt.add_param_group({"params": [second]})
        for p in (first, second):
            p.grad = torch.ones_like(p)
        opt.step(lambda: next(losses))
        if opt.guard_report["active"]:
            break
    assert [torch.equal(p, torch.ones(2)) for p in (first, second)] == [True, True]
    assert idle not in opt.state
    assert ["guard_watch" in group for group in opt.param_groups] == [True, False]


def test_it_is_printed_with_its_settings_alone() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm(), guard=QUICK)
    before = repr(opt)
    train(model, opt, 2)
    assert repr(opt) == before
    assert f"\n{QUICK}\n" in before
    assert "guard_watch" not in before


def test_compiling_the_step_is_refused_with_a_remedy() -> None:
    torch._dynamo.reset()
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm(), guard=QUICK)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step = torch.compile(opt.step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call step\\(\\) uncompiled"):
        step(lambda: torch.tensor(1.0))
    torch._dynamo.reset()


# ---- saving and copying


@pytest.mark.parametrize("at", [0, 1, 3, 12, 45, 60])
def test_resuming_gives_the_same_bits(at: int) -> None:
    """Before, in, between and after interventions, through a file."""
    rule = BAD_RULES["ascending"]()
    model, saved = small_net(), {}
    opt = LearnedOptimizer(model.parameters(), rule, guard=QUICK, weight_decay=1.0)
    x, y = small_batch()

    def advance(net: nn.Module, optimizer: LearnedOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)

    advance(model, opt, at)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, buffer)
    advance(model, opt, 100 - at)
    assert opt.guard_report["interventions"] >= 2

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = small_net(seed=1)
    twin.load_state_dict(saved["model"])
    resumed = LearnedOptimizer(twin.parameters(), rule, guard=QUICK, weight_decay=1.0)
    resumed.load_state_dict(saved["optimizer"])
    advance(twin, resumed, 100 - at)
    assert torch.equal(flat(twin), flat(model))
    assert resumed.guard_report == opt.guard_report
    for a, b in zip(resumed.state.values(), opt.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_a_state_dict_does_not_change_afterwards() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), descending_lstm(), guard=True)
    train(model, opt, 2)
    saved = opt.state_dict()["param_groups"][0]["guard_watch"]
    before = dict(saved)
    train(model, opt, 2)
    assert saved == before
    assert opt.state_dict()["param_groups"][0]["guard_watch"]["steps"] == 4


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("at", [2, 20])
def test_copies_go_on_alike(make_copy: Callable[[Any], Any], at: int) -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), BAD_RULES["ascending"](), guard=QUICK)
    train(model, opt, at)
    model2, opt2 = make_copy((model, opt))
    assert opt2.guard == QUICK
    assert train(model, opt, 60) == train(model2, opt2, 60)
    assert opt2.guard_report == opt.guard_report
    assert opt.guard_report["interventions"] >= 1


def test_distributed_checkpoints_keep_it() -> None:
    """get_optimizer_state_dict passes on state and groups alone, and so is where the guard is."""
    rule = BAD_RULES["ascending"]()
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), rule, guard=QUICK)
    train(model, opt, 20)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    twin = copy.deepcopy(model)
    fresh = LearnedOptimizer(twin.parameters(), rule, guard=QUICK)
    set_optimizer_state_dict(twin, fresh, saved)
    assert fresh.guard_report == opt.guard_report
    assert fresh.guard_report["active"] == 1
    assert train(twin, fresh, 60) == train(model, opt, 60)


def test_a_guard_may_be_put_on_or_taken_off_in_mid_run() -> None:
    rule = descending_lstm()
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), rule)
    train(model, opt, 5)
    on = LearnedOptimizer(model.parameters(), rule, guard=QUICK)
    on.load_state_dict(opt.state_dict())
    assert on.guard_report["steps"] == 0
    assert all("guard_snapshot" in state for state in on.state.values())
    off = LearnedOptimizer(model.parameters(), rule)
    off.load_state_dict(on.state_dict())
    for a, b in zip(off.state.values(), opt.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert "guard_watch" not in off.param_groups[0]
    other = LearnedOptimizer(model.parameters(), make_rule("adam"), guard=QUICK)
    train(model, other, 1)
    foreign = other.state_dict()
    del foreign["rule"]
    with pytest.raises(ValueError, match="does not fit the update rule 'lstm'"):
        on.load_state_dict(foreign)


def test_adam_does_not_take_over_a_weight_decay_that_is_the_rules_own() -> None:
    """It is meant for a schedule, and would shrink weights by half in a few hundred steps."""
    found = []
    for own in (0.0, 50.0):
        guarded = GuardedRule(HorizonRule(HorizonConfig(weight_decay=own)), Guard())
        guarded.by_adam = True
        param = torch.linspace(-1, 1, 6)
        state = {"step": torch.zeros(()), **guarded.init_state(param)}
        guarded.step_([param], [param.cos()], [state], weight_decay=own, total_steps=100)
        found.append(param)
    assert torch.equal(*found)
