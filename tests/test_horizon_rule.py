"""The horizon rule against a plain account of what it is before training, and its bounds."""

import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compat.common import descend, step_with
from conftest import fresh_states, random_rule
from torch import Tensor
from torch.nn import Parameter

from learned_optim import LearnedOptimizer
from learned_optim.meta.rollout import pack_states
from learned_optim.rules import Segments, StepContext, StepSettings
from learned_optim.rules import _history as history
from learned_optim.rules.horizon import HorizonRule


def schedule(t: int, total: int | None) -> float:
    """Of the step number ``t``, from 1."""
    if total is None:
        return min(1, t / 50)
    warmup = min(250, max(10, 0.1 * total))
    return min(1, t / warmup) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * min(1, t / (total + 1))))


def next_log(
    log: float, agreement: float, mean: float, growth: float, step: int, known: bool
) -> float:
    """The log of the step confidence after a step."""
    floor = max(-3.0, -0.5 * math.log(1 + step / 50))
    if step < 50 or log < floor:
        return min(0.0, max(-3.0, log + (1.5 * agreement if log < 0 else 0.0)))
    if not known:
        return min(0.0, max(floor, log + 0.05 * agreement))
    lost = 0.4 * max(0.0, growth - 0.3) if mean < -0.1 else 0.0
    return min(0.0, max(floor, log + (0.1 * agreement if agreement > 0 else -lost)))


def plain(grads: Tensor, param: Tensor, total: int | None) -> tuple[Tensor, list[float]]:
    """Adam in units of the tensor's scale; parameters and logs of confidence after each step."""
    natural = 0.1 if param.dim() < 2 else min(0.1, math.prod(param.shape[1:]) ** -0.5)
    fast, square, before = torch.zeros_like(param), torch.zeros_like(param), param
    log, mean_cosine, mean_level, found, logs = -3.0, 0.0, 0.0, [], []
    for t, grad in enumerate(grads, start=1):
        square = 0.99 * square + 0.01 * grad**2
        r = (square / (1 - 0.99**t)).sqrt() + 1e-15
        ratio, old = (grad / r).clamp(-3, 3), fast / r
        fast = 0.9 * fast + 0.1 * grad
        # The scale is that of the step before: everything is known in one pass.
        scale = max(0.25 * natural, min(0.1, before.square().mean().sqrt().item()))
        size = 0.1 * schedule(t, total) * scale * math.exp(log)
        before, param = param, param - size * fast / (1 - 0.9**t) / r
        cosine, level = 0.0, r.square().mean().log().item()
        if t > 1:
            cosine = ((ratio * old).mean() / (ratio.norm() * old.norm()) * ratio.numel()).item()
        live = cosine / (grad != 0).double().mean().sqrt().item()
        mean_cosine = 0.99 * mean_cosine + 0.01 * cosine
        growth = level - mean_level if t > 1 else 0.0
        mean_level = 0.99 * mean_level + 0.01 * level if t > 1 else level
        mean = mean_cosine / (1 - 0.99**t)
        log = next_log(log, max(-1, min(1, live)), mean, growth, t - 1, total is not None)
        found.append(param)
        logs.append(log)
    return torch.stack(found), logs


@pytest.mark.parametrize("total", [None, 40, 1000])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("drift", (7,)), ("drift", (5, 3)), ("drift", (4, 300)), ("drift", (6, 2, 3, 3)),
     ("noise", (30, 20)), ("rows", (30, 20)), ("turns", (30, 20))],
)  # fmt: skip
def test_untrained_it_is_adam_in_natural_units_with_schedule_and_confidence(
    kind: str, shape: tuple[int, ...], total: int | None
) -> None:
    """Confidence grows where gradients agree, those of touched rows included; noise earns none."""
    grads = torch.randn(60, *shape, dtype=torch.float64)
    param, signal = torch.randn(2, *shape, dtype=torch.float64)
    if kind == "drift":
        grads = grads + 2 * signal
    elif kind == "rows":  # as of an embedding
        touched = torch.rand(60, shape[0], 1) < 0.3
        grads = touched * (grads + 2 * signal)
    elif kind == "turns":
        grads = grads + signal * torch.tensor([1.0, -1.0]).double().repeat(30).view(60, 1, 1)
    expected, logs = plain(grads, param, total)
    own, found, seen = Parameter(param.clone()), [], []
    opt = LearnedOptimizer([own], HorizonRule().double(), total_steps=total, weight_decay=0.0)
    for step, grad in enumerate(grads):
        past = total == 40 and step == 40
        with pytest.warns(UserWarning, match="past total_steps=40") if past else nullcontext():
            step_with(opt, grad)
        found.append(own.detach().clone())
        seen.append(opt.state[own]["stats"].flatten()[history.CONFIDENCE].item())
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-6, atol=1e-9)
    assert seen == pytest.approx(logs, abs=1e-6)
    assert (max(seen[:40]) > -0.5) == (kind in ("drift", "rows"))


def test_the_length_of_the_run_counts_for_each_tensor() -> None:
    rule = random_rule("horizon", torch.float64)
    params = [torch.ones(4).double(), torch.randn(3, 2).double()]
    grad, step = torch.randn(10).double(), torch.tensor([90.0, 90.0]).double()

    def update(chosen: slice, totals: Any) -> list[Tensor]:
        own = params[chosen]
        flat = torch.cat([p.reshape(-1) for p in own])
        segments = Segments([p.shape for p in own], dtype=torch.float64)
        state = pack_states(rule, [rule.init_state(p) for p in own])
        part = grad[4:] if chosen == slice(1, 2) else grad[: len(flat)]
        context = StepContext(step[chosen], None, totals)
        with torch.no_grad():
            moved = rule(part, state, flat, segments, context)[0]
        return list(moved.split([p.numel() for p in own]))

    both = update(slice(0, 2), torch.tensor([100.0, 1000.0]).double())
    alone = [*update(slice(0, 1), 100.0), *update(slice(1, 2), 1000.0)]
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-15)
    rates = [update(slice(0, 1), t)[0].abs().max().item() for t in (100.0, 10_000.0, None)]
    assert len({*rates}) == 3  # the network sees the length


def test_it_anneals_where_the_length_is_unknown() -> None:
    """A regression on noisy labels; the excess loss falls though the noise stays."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(40, generator=generator)
    weight = torch.zeros(1, 40, requires_grad=True)
    excess = []

    def loss() -> Tensor:
        x = torch.randn(8, 40, generator=generator)
        noise = 3 * torch.randn(8, generator=generator)
        excess.append((weight.detach()[0] - target).square().sum().item())
        return ((weight @ x.T)[0] - x @ target - noise).square().mean()

    descend(LearnedOptimizer([weight], "diagonal"), 1500, loss)
    assert sum(excess[-300:]) < 0.75 * sum(excess[300:600])


# ---- weight decay


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("total", [None, 40])
def test_weight_decay_follows_schedule_and_confidence(total: int | None) -> None:
    """After the first step an update does not depend on the parameter, so it cancels out."""
    rule, ends = random_rule("horizon"), []
    for decay in (0.0, 300.0):
        params, ends_of = [torch.full((3, 2), 2.0)], []
        for step in range(1, 31):
            states = fresh_states(rule, params)
            states[0]["step"].fill_(step)
            states[0]["stats"][history.RMS] = 1e-3
            states[0]["stats"][history.CONFIDENCE] = -step / 10
            param = [params[0].clone()]
            numbers = StepSettings(lr=0.5, total_steps=total, weight_decay=decay)
            rule.step_(param, [torch.ones(3, 2)], states, numbers)
            ends_of.append(param[0][0, 0].item())
        ends.append(ends_of)
    shrunk = [before - after for before, after in zip(*ends, strict=True)]
    expected = [
        2 * 1e-3 * 0.5 * 300 * schedule(t + 1, total) ** 3 * math.exp(-t / 10) for t in range(1, 31)
    ]
    assert shrunk == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_without_a_weight_decay_given_runs_of_known_length_have_one() -> None:
    def decays(groups: list[dict[str, Any]], **options: Any) -> list[float]:
        groups = [{"params": [Parameter(torch.ones(2))], **group} for group in groups]
        opt = LearnedOptimizer(groups, HorizonRule(), **options)
        return [group["weight_decay"] for group in opt.param_groups]

    lengths = [{"total_steps": n} for n in (100, 4000, 16_000, None)]
    assert decays(lengths) == [1.0, 1.0, 0.25, 0.0]
    assert decays([{}, {"weight_decay": 0.3}], total_steps=8000) == [0.5, 0.3]
    assert decays([{}, {"weight_decay": None}], total_steps=500, weight_decay=0.0) == [0.0, 1.0]
    opt = LearnedOptimizer([torch.ones(2)], HorizonRule(), total_steps=4000)
    opt = pickle.loads(pickle.dumps(opt))
    opt.add_param_group({"params": [torch.ones(2)], "total_steps": 8000})
    assert [group["weight_decay"] for group in opt.param_groups] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"total_steps .* got 2\.5"):
        decays([{"total_steps": 2.5}])


@pytest.mark.usefixtures("either_form")
def test_rows_without_a_gradient_do_not_shrink() -> None:
    table = Parameter(torch.randn(5, 3))
    other, before = Parameter(torch.ones(4)), table.detach().clone()
    opt = LearnedOptimizer([table, other], HorizonRule(), total_steps=20, weight_decay=50.0)
    for _ in range(20):
        table.grad, other.grad = torch.zeros(5, 3), torch.zeros(4)
        table.grad[:2] = 1e-30 * torch.tensor([[1.0], [-1.0]])
        table.grad[4] = math.nan
        opt.step()
    assert torch.equal(table[2:], before[2:])
    assert torch.equal(other, torch.ones(4))  # zero history gives zero update
    assert (table[:2] - before[:2]).abs().min() > 1e-4
