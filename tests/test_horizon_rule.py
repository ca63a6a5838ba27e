"""The horizon rule against a plain account of what it is before training, and its bounds."""

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import pack, random_rule, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from learned_optim import LearnedOptimizer, kernels, load_rule
from learned_optim.meta.tasks.coordinates import sine_network
from learned_optim.rules import Segments, StepContext
from learned_optim.rules import _history as history
from learned_optim.rules.horizon import HorizonConfig, HorizonRule


def backbone(grads: torch.Tensor, param: torch.Tensor, total: int | None) -> torch.Tensor:
    """Adam in units of the tensor's scale with warm-up and cosine; parameters after each step."""
    natural = 0.1 if param.dim() < 2 else min(0.1, math.prod(param.shape[1:]) ** -0.5)
    momentum, square = torch.zeros_like(param), torch.zeros_like(param)
    before, found = param, []
    for t, grad in enumerate(grads, start=1):
        momentum = 0.9 * momentum + 0.1 * grad
        square = 0.99 * square + 0.01 * grad**2
        direction = momentum / (1 - 0.9**t) / (square / (1 - 0.99**t)).sqrt()
        warmup = 50 if total is None else min(250, max(10, 0.1 * total))
        rate = 0.1 * min(1, t / warmup)
        if total is not None:
            rate *= max(0.01, 0.5 + 0.5 * math.cos(math.pi * min(1, t / (total + 1))))
        # The scale is that of the step before: everything is known in one pass.
        scale = max(0.25 * natural, min(0.1, before.square().mean().sqrt().item()))
        before, param = param, param - rate * scale * direction
        found.append(param)
    return torch.stack(found)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 300), (6, 2, 3, 3)])
@pytest.mark.parametrize("total", [None, 40, 1000])
def test_untrained_it_is_adam_in_natural_units_with_a_schedule(shape, total) -> None:
    torch.manual_seed(0)
    param = torch.randn(shape, dtype=torch.float64)
    grads = torch.randn(60, *shape, dtype=torch.float64) + 0.3
    own = Parameter(param.clone())
    opt, found = LearnedOptimizer([own], HorizonRule().double(), total_steps=total), []
    for step, grad in enumerate(grads):
        own.grad = grad
        if total == 40 and step == 40:
            with pytest.warns(UserWarning, match="past total_steps=40"):
                opt.step()
        else:
            opt.step()
        found.append(own.detach().clone())
    torch.testing.assert_close(torch.stack(found), backbone(grads, param, total), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(-8, 8), total=st.sampled_from([None, 30, 500]))
def test_no_step_is_longer_than_the_stated_bound(seed: int, spread: float, total) -> None:
    """Whatever the weights and the gradients: bursts after silence, twelve decades, one-sided."""
    rule = random_rule("horizon", torch.float64)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.mul_(3.0)
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    grads = grads * torch.exp(spread * torch.randn(40, 1, generator=generator)) * (grads > 0.5)
    segments, state = Segments([torch.Size([3, 3])], dtype=torch.float64), None
    param = torch.randn(9, generator=generator, dtype=torch.float64)
    state = pack(rule, [rule.init_state(param.view(3, 3))])
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor([float(step)]).double(), None, total)
        with torch.no_grad():
            update, new = rule(grad, state, param, segments, context)
        state = {**state, **new}
        assert float(update.abs().max()) <= rule.longest_step * 0.1 * (1 + 1e-6)
        param = param + update


def test_longer_runs_anneal_later_and_the_network_sees_the_horizon() -> None:
    rule = random_rule("horizon", torch.float64)
    grads, param = torch.ones(5, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    segments = Segments([torch.Size([6])], dtype=torch.float64)
    state = pack(rule, [rule.init_state(param)])
    rates = {}
    for total in (100.0, 10_000.0, None):
        context = StepContext(torch.tensor([90.0]).double(), None, total)
        with torch.no_grad():
            rates[total] = rule(grads[0], state, param, segments, context)[0].abs().max().item()
    assert rates[100.0] < 0.2 * rates[10_000.0]
    assert len(set(rates.values())) == 3


def test_total_steps_may_differ_by_tensor() -> None:
    rule = random_rule("horizon", torch.float64)
    params = [torch.randn(4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)]
    grad = torch.randn(10, dtype=torch.float64)
    segments = Segments([p.shape for p in params], dtype=torch.float64)
    state = pack(rule, [rule.init_state(p) for p in params])
    totals = torch.tensor([50.0, 500.0]).double()
    context = StepContext(torch.tensor([20.0, 20.0]).double(), None, totals)
    together = rule(grad, state, torch.cat([p.reshape(-1) for p in params]), segments, context)[0]
    for part, param, total in zip(together.split([4, 6]), params, (50.0, 500.0), strict=True):
        at = slice(0, 4) if param.dim() == 1 else slice(4, 10)
        alone = rule(
            grad[at],
            pack(rule, [rule.init_state(param)]),
            param.reshape(-1),
            Segments([param.shape], dtype=torch.float64),
            StepContext(torch.tensor([20.0]).double(), None, total),
        )[0]
        torch.testing.assert_close(part, alone, rtol=1e-12, atol=1e-15)


def test_its_first_momenta_count_for_nothing_and_its_silent_tensors_for_no_statistics() -> None:
    """A tensor without gradients so far learns only its root mean square."""
    rule = random_rule("horizon", torch.float64)
    param = torch.full((4,), 2.0, dtype=torch.float64)
    state = pack(rule, [rule.init_state(param)])
    segments = Segments([torch.Size([4])], dtype=torch.float64)
    context = StepContext(torch.zeros(1).double(), None, 100.0)
    update, new = rule(torch.zeros(4).double(), state, param, segments, context)
    assert torch.count_nonzero(update) == 0
    assert new["stats"][0, :2].tolist() == [2.0, 2.0]
    assert torch.count_nonzero(new["stats"][0, 2:]) == 0


def trusts(grads: torch.Tensor, start: float, gain: float) -> list[float]:
    """A plain account: log of the trust before each step."""
    fast, square, z, found = torch.zeros(grads.shape[1:]), torch.zeros(grads.shape[1:]), start, []
    for t, grad in enumerate(grads.float(), start=1):
        found.append(z)
        square = 0.99 * square + 0.01 * grad**2
        r = (square / (1 - 0.99**t)).sqrt() + 1e-15
        ratio, old = (grad / r).clamp(-3, 3), fast / r
        if t > 1:
            cosine = (ratio * old).mean() / (ratio.square().mean() * old.square().mean()).sqrt()
            live = cosine / (grad != 0).float().mean().sqrt()
            z = 0.0 if z == 0 else min(0.0, max(start, z + gain * live.clamp(-1, 1).item()))
        fast = 0.9 * fast + 0.1 * grad
    return found


@pytest.mark.parametrize(
    ("kind", "grows"), [("signal", True), ("rows", True), ("noise", False), ("turns", False)]
)
def test_the_trust_grows_where_gradients_agree(kind: str, grows: bool) -> None:
    """The untrained rule's steps are the backbone's times the trust; noise never earns it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 30, 20, generator=generator, dtype=torch.float64)
    signal = torch.ones(60, 1, 1).double() * torch.randn(30, 20, generator=generator).double()
    turning = signal * torch.tensor([1.0, -1.0]).double().repeat(30).view(60, 1, 1)
    touched = torch.rand(60, 30, 1, generator=generator).double() < 0.3  # as of an embedding
    grads = {
        "signal": noise + signal,
        "rows": touched * (noise + 2 * signal),
        "noise": noise,
        "turns": noise + turning,
    }[kind]
    rule = HorizonRule(HorizonConfig(trust_start=-3.0, trust_gain=1.5)).double()
    expected = trusts(grads, -3.0, 1.5)
    param = torch.zeros(30, 20, dtype=torch.float64)  # zero, so that the scale is the shape's
    plain, own = (trajectory(each, grads[:2], param) for each in (HorizonRule().double(), rule))
    torch.testing.assert_close(own[0], plain[0] * math.exp(-3.0))
    state = pack(rule, [rule.init_state(param)])
    segments, found = Segments([param.shape], dtype=torch.float64), []
    for step, grad in enumerate(grads):
        found.append(state["stats"][0, history.TRUST].item())
        context = StepContext(torch.tensor([float(step)]).double(), None, None)
        with torch.no_grad():
            _, new = rule(grad.reshape(-1), state, param.reshape(-1), segments, context)
        state = {**state, **new}
    assert found == pytest.approx(expected, abs=1e-4)
    assert (found[20] > -0.5) == grows
    assert grows or max(found) < -1.5


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("plateau", [0, 70])
@pytest.mark.parametrize("growth", [0.0, 4.0])
@pytest.mark.parametrize("gains", [(0.2, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_a_whole_trust_falls_again_where_there_is_a_later_gain(
    known: bool, plateau: int, gains: tuple[float, float], growth: float
) -> None:
    """Also if it took longer than the warm-up to become whole; or where gradients grow."""
    trust = history.Trust(
        -3.0, 1.5, later_gain=gains[0], known_gain=gains[1], margin=0.1, growth=growth, warmup=50
    )
    later_gain, margin = gains[known], 0.1 * known
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(80, generator=generator).double() - 0.5
    agree = torch.full((60,), 0.9).double()
    agreements = torch.cat((torch.full((plateau,), -0.1), agree, noise - 0.3, noise + 0.3))
    log, z, told, found = torch.tensor([-3.0]).double(), -3.0, torch.tensor([float(known)]), []
    for step, agreement in enumerate(agreements):
        mean, grown = (-0.2, 0.0)[step % 4 == 0], (0.2, 1.3)[step % 3 == 0]
        log = trust.after(
            log, agreement, torch.tensor([mean]), torch.tensor([grown]).double(),
            torch.tensor([float(step)]), told,
        )  # fmt: skip
        floor = -0.5 * math.log(1 + step / 50)
        later = later_gain > 0 and step >= 50 and z >= floor
        gain = later_gain if later else 1.5 if z < 0 else 0.0
        low = floor if later else -3.0
        moved = agreement.item() + margin * later
        if growth and known and later:
            moved = max(0.0, agreement.item())
            if agreement <= 0 and mean < -0.1:
                moved = -growth * max(0.0, grown - 0.3)
        z = min(0.0, max(low, z + gain * moved))
        found.append(z)
        assert log.item() == pytest.approx(z, abs=1e-6)
    early, falling, late = found[:plateau], found[plateau + 60 : plateau + 140], found[-80:]
    assert all(z == -3.0 for z in early)
    assert found[plateau + 59] == 0.0
    assert (min(falling) < -3 * later_gain) is (later_gain > 0)
    assert min(falling) >= -0.5 * math.log(1 + len(found) / 50)  # one over the root of the steps
    assert max(late) == 0.0  # and it grows again


def test_values_are_checked() -> None:
    for values, message in (
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"trust_start": 1.0}, "trust_start must be at most 0, got 1.0"),
        ({"trust_gain": -1.0}, "trust_gain must be at least 0, got -1.0"),
        ({"trust_later_gain": -0.1}, "trust_later_gain must be at least 0, got -0.1"),
        ({"trust_known_gain": -0.1}, "trust_known_gain must be at least 0, got -0.1"),
        ({"trust_margin": -0.1}, "trust_margin must be at least 0, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            HorizonConfig(**values)


def test_its_updates_depend_on_the_weights_everywhere() -> None:
    """Each of the five outputs moves the update: none is cut off from it."""
    base = random_rule("horizon", torch.float64)
    grads, param = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(5, 4).double()
    expected = trajectory(base, grads, param)
    for output in range(5):
        rule = random_rule("horizon", torch.float64)
        with torch.no_grad():
            rule.readout.bias[output] += 0.1
        assert not torch.allclose(trajectory(rule, grads, param), expected, rtol=1e-4)


def noisy_descent(checkpoint: str | HorizonRule, steps: int, told: int | None) -> float:
    """Mean excess loss of the last fifth, of a regression on noisy labels."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(40, generator=generator)
    weight = torch.zeros(1, 40, requires_grad=True)
    optimizer = LearnedOptimizer([weight], checkpoint, total_steps=told)
    excess = []
    for _ in range(steps):
        x = torch.randn(8, 40, generator=generator)
        noise = 3 * torch.randn(8, generator=generator)
        optimizer.zero_grad()
        ((weight @ x.T)[0] - x @ target - noise).square().mean().backward()
        optimizer.step()
        excess.append((weight.detach()[0] - target).square().sum().item())
    return sum(excess[-steps // 5 :]) / (steps // 5)


def with_config(checkpoint: str, **changes: Any) -> HorizonRule:
    """A shipped rule under another configuration."""
    rule = load_rule(checkpoint)
    changed = HorizonRule(replace(rule.config, **changes))
    changed.load_state_dict(rule.state_dict())
    return changed


def test_it_anneals_where_the_length_is_unknown() -> None:
    constant = with_config("diagonal", trust_later_gain=0.0)
    assert noisy_descent("diagonal", 1500, None) < 0.75 * noisy_descent(constant, 1500, None)


def fit_waves(rule: str | HorizonRule) -> float:
    """Loss of a network of sines after 1,500 steps of known length, in units of the first."""
    torch.manual_seed(0)
    model = sine_network(inputs=2, outputs=1, width=40)
    generator = torch.Generator().manual_seed(1)
    waves = 8 * torch.randn(12, 2, generator=generator)
    phases = torch.randn(12, generator=generator)
    optimizer = LearnedOptimizer(model.parameters(), rule, total_steps=1500, weight_decay=0.0)
    losses = []
    for _ in range(1500):
        x = 2 * torch.rand(96, 2, generator=generator) - 1
        wanted = 2 * (x @ waves.T + phases).sin().mean(1, keepdim=True)
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-75:]) / 75 / losses[0]


def test_it_shortens_steps_that_are_too_long_where_the_length_is_known() -> None:
    never = with_config("diagonal", trust_known_gain=0.0, trust_growth=0.0)
    assert fit_waves("diagonal") < 1e-3 < 0.5 < fit_waves(never)


@pytest.mark.parametrize("total", [None, 40])
@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_follows_schedule_and_trust(
    total: int | None, dtype: torch.dtype, power: float
) -> None:
    """Where gradients are zero a trust stays, and parameters do nothing but shrink."""
    rule = HorizonRule(HorizonConfig(warmup_steps=5, trust_start=-2.0, decay_power=power)).to(dtype)
    params = [Parameter(torch.full((3, 2), 2.0, dtype=dtype)) for _ in range(2)]
    groups = [{"params": params[:1], "weight_decay": 30.0}, {"params": params[1:]}]
    opt, expected = LearnedOptimizer(groups, rule, lr=0.5, total_steps=total), 2.0
    for t in range(1, 31):
        rate = min(1, t / 5)
        if total is not None:
            rate = min(1, t / 10) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * t / 41))
        expected *= 1 - 1e-3 * 0.5 * 30 * rate**power * math.exp(-2)
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
    tolerance = 1e-6 if dtype is torch.float32 else 1e-7
    torch.testing.assert_close(
        params[0], torch.full_like(params[0], expected), rtol=tolerance, atol=0
    )
    assert torch.equal(params[1], torch.full_like(params[1], 2.0))


def test_a_weight_decay_of_the_rules_own_is_for_users_who_give_none_and_know_the_length() -> None:
    rule = HorizonRule(HorizonConfig(weight_decay=2.0))

    def decays(groups: list[dict[str, Any]], **options: Any) -> list[float]:
        groups = [{"params": [Parameter(torch.ones(2))], **group} for group in groups]
        return [g["weight_decay"] for g in LearnedOptimizer(groups, rule, **options).param_groups]

    lengths = [{"total_steps": n} for n in (100, 4000, 16_000, None)]
    assert decays(lengths) == [2.0, 2.0, 0.5, 0.0]
    assert decays([{}, {"weight_decay": 0.3}], total_steps=8000) == [1.0, 0.3]
    assert decays([{}, {"weight_decay": None}], total_steps=500, weight_decay=0.0) == [0.0, 2.0]
    opt = pickle.loads(pickle.dumps(LearnedOptimizer([torch.ones(2)], rule, total_steps=4000)))
    opt.add_param_group({"params": [torch.ones(2)], "total_steps": 8000})
    assert [group["weight_decay"] for group in opt.param_groups] == [2.0, 1.0]
    with pytest.raises(ValueError, match=r"total_steps .* got 2\.5"):
        decays([{"total_steps": 2.5}])


@pytest.fixture(params=["compiled", "pure"])
def either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step by the kernel, and without it."""
    if request.param == "pure":
        monkeypatch.setattr(kernels, "step_", lambda *_, **__: False)
        monkeypatch.setattr(kernels, "bind", lambda *_, **__: None)


@pytest.mark.usefixtures("either_form")
def test_rows_without_a_gradient_do_not_shrink_where_decay_spares_them() -> None:
    rule = HorizonRule(HorizonConfig(weight_decay=50.0, decay_live=True))
    table = Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    other = Parameter(torch.ones(4))
    before, opt = table.detach().clone(), LearnedOptimizer([table, other], rule, total_steps=20)
    for _ in range(20):
        table.grad, other.grad = torch.zeros(5, 3), torch.zeros(4)
        table.grad[:2] = 1e-30 * torch.tensor([[1.0], [-1.0]])
        table.grad[4] = math.nan
        opt.step()
    assert torch.equal(table[2:], before[2:])
    assert torch.equal(other, torch.ones(4))  # zero history gives zero update
    assert (table[:2] - before[:2]).abs().min() > 0.01


def test_steps_with_a_weight_decay_of_its_own_are_those_with_it_given() -> None:
    config = HorizonConfig(trust_start=-2.0, trust_gain=1.5, weight_decay=40.0, decay_power=3.0)
    own, given = HorizonRule(config), HorizonRule(replace(config, weight_decay=0.0))
    given.load_state_dict(own.state_dict())
    found = []
    for rule, decay in ((own, None), (given, 40.0), (own, 0.0)):
        param = Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        opt = LearnedOptimizer([param], rule, total_steps=60, weight_decay=decay)
        for step in range(60):
            param.grad = torch.cos(param.detach() * 3 + step)
            opt.step()
        found.append(param.detach().clone())
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.01


@pytest.mark.usefixtures("either_form")
def test_tall_matrices_that_start_at_zero_step_less_the_more_of_them_is_live() -> None:
    """Adapters by a power of width over height; tables, of which batches touch few rows, hardly."""
    plain = HorizonRule()
    shorter = HorizonRule(HorizonConfig(adapter_power=0.5))
    shorter.load_state_dict(plain.state_dict())
    starts = {
        "adapter": torch.zeros(64, 4),
        "table": torch.zeros(64, 4),
        "wide": torch.zeros(4, 64),
        "vector": torch.zeros(64),
        "not zero": torch.full((64, 4), 1e-3),
    }
    found = []
    for rule in (plain, shorter):
        params = [Parameter(start.clone()) for start in starts.values()]
        opt = LearnedOptimizer(params, rule, total_steps=20)
        generator = torch.Generator().manual_seed(0)
        moves = []
        for _ in range(2):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            params[1].grad[1:] = 0.0  # type: ignore[index]
            opt.step()
            steps = [p.detach() - b for p, b in zip(params, before, strict=True)]
            moves.append([float(step.norm()) for step in steps])
        found.append(torch.tensor(moves))
    ratios = found[1] / found[0]
    # The first step cannot know yet what is live. The scale of what starts at zero is its floor.
    live = torch.tensor([[1.0, 1.0], [1.0, 1 / 64]])
    torch.testing.assert_close(ratios[:, :2], (4 / 64) ** (0.5 * live), rtol=1e-5, atol=0)
    assert torch.equal(ratios[:, 2:], torch.ones(2, 3))
