"""The field: its tasks, and pinned final losses."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compat.common import descend

from learned_optim.evaluation.figures import final_loss
from learned_optim.evaluation.runs import STRETCHES, RunSpec, optimizer_specs, run
from learned_optim.meta import DataOptions
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import TaskOptions, build_tasks, field_tasks, finetuning
from learned_optim.meta.tasks.finetuning import with_adapters
from learned_optim.meta.tasks.physics import DIFFUSION, solution, source
from learned_optim.meta.tasks.surrogates import (
    TORQUE,
    Adversaries,
    advance,
    observed,
    sliced_distance,
)

# ---- the tasks


def test_stated_steps() -> None:
    for name, found in field_tasks().items():
        assert 1000 <= found.steps <= 10_000, name
        assert 300 <= found.quick <= 1000, name
        # A run's losses are kept as means over a hundred stretches of equal length.
        assert found.steps % STRETCHES == found.quick % STRETCHES == 0


@pytest.mark.parametrize("name", sorted(field_tasks()))
def test_every_task_trains(
    name: str, data_for: Callable[[bool], DataOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of Adam's steps lower the loss on one batch; weights and batches are the seeds'."""
    data = data_for(field_tasks()[name].data_set is not None)
    pretrained = finetuning.pretrained
    shortened = lambda task, steps, lr=1e-3: pretrained(task, 20, lr)  # noqa: E731
    monkeypatch.setattr(finetuning, "pretrained", shortened)
    for trained in ("_trained_convnet", "_trained_transformer"):
        uncached = getattr(finetuning, trained).__wrapped__
        monkeypatch.setattr(finetuning, trained, uncached)
    starts = []
    for drawn_before in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn_before)
            task = build_tasks(name, TaskOptions(data=data)).sample(seeded(0))
            starts.append((task.init(seeded(1)), task.batch(seeded(2))))
    (initial, batch), (again, other) = starts
    assert all(torch.equal(p, again[n]) for n, p in initial.items())
    assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    first = {n: torch.nn.Parameter(p) for n, p in initial.items()}
    before = task.loss(first, batch).item()
    # These two do not descend their loss: they have tests of their own.
    steps = 0 if name in ("policy-gradient", "adversarial-pair") else 15
    optimizer = torch.optim.Adam(first.values(), lr=1e-3)
    descend(optimizer, steps, lambda: task.loss(first, batch))
    after = task.loss(first, batch).item()
    assert after < before or not steps
    figures = task.test({n: p.detach() for n, p in first.items()})
    assert math.isfinite(figures["loss"])
    assert 0.0 <= figures.get("accuracy", 0.0) <= 1.0


def test_pendulum_by_hand() -> None:
    state = torch.tensor([[math.pi, 0.0], [0.0, 1.0]])
    following, cost = advance(state, torch.tensor([2.0, 0.0]))
    # Hanging: the farthest from the top, and the torque is cut off. Upright: the speed's tenth.
    assert cost.tolist() == pytest.approx([math.pi**2 + 1e-3 * TORQUE**2, 0.1], rel=1e-5)
    assert following[0].tolist() == pytest.approx([math.pi + 0.05 * 0.9, 0.9], rel=1e-4)
    assert observed(state)[1].tolist() == pytest.approx([1.0, 0.0, 0.125])


@pytest.mark.slow
def test_policy_gradient_learns_to_hold_the_pendulum() -> None:
    """Adam's estimate of the gradient is enough: near the top at the end, far from it before."""
    task = build_tasks("policy-gradient").sample(seeded(0))
    params = {n: torch.nn.Parameter(p) for n, p in task.init(seeded(1)).items()}
    before = task.test(params)["cost at the end"]
    optimizer, generator = torch.optim.Adam(params.values(), lr=1e-2), seeded(2)
    descend(optimizer, 100, lambda: task.loss(params, task.batch(generator)))
    assert before > 2.0
    assert task.test(params)["cost at the end"] < 0.2


def test_adversaries_have_each_their_own_gradient() -> None:
    """The discriminator's gradient is that of its loss alone, and the generator's likewise."""
    task = Adversaries()
    params = {n: torch.nn.Parameter(p) for n, p in task.init(seeded(0)).items()}
    real, noise = task.batch(seeded(1))
    loss = task.loss(params, (real, noise))
    loss.backward()
    task.module.load_state_dict(params)
    fake = task.module.generator(noise)
    assert loss.item() == pytest.approx(sliced_distance(fake, real).item(), rel=1e-5)
    real = real.requires_grad_()
    at_real, at_fake = (task.module.discriminator(x) for x in (real, fake.detach()))
    (slopes,) = torch.autograd.grad(at_real.sum(), real, create_graph=True)
    penalty = 0.5 * slopes.square().sum(1).mean()
    (F.softplus(-at_real).mean() + F.softplus(at_fake).mean() + penalty).backward()
    expected = task.module.discriminator[0].weight.grad
    torch.testing.assert_close(params["discriminator.0.weight"].grad, expected)
    task.module.zero_grad()
    F.softplus(-task.module.discriminator(fake)).mean().backward()
    expected = task.module.generator[0].weight.grad
    torch.testing.assert_close(params["generator.0.weight"].grad, expected)


def test_the_heat_equations_solution_solves_it() -> None:
    points = torch.rand(50, 2, dtype=torch.float64, requires_grad=True)
    u = solution(points)
    (slopes,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes[:, 1].sum(), points)
    residual = slopes[:, 0] - DIFFUSION * curvatures[:, 1] + u**3 - source(points)
    assert residual.abs().max() < 1e-12


def test_adapters_start_as_the_network_they_adapt() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    adapted = with_adapters(base)
    x = torch.randn(5, 6)
    torch.testing.assert_close(adapted(x), base(x))
    names = {name for name, _ in adapted.named_parameters()}
    assert names == {"0.down", "0.up", "2.down", "2.up"}
    assert all(p.requires_grad for p in base.parameters())


# ---- pinned: a tier of seconds

PINNED = {
    "regression": 0.45446,
    "matrix-factorization": 1.06624,
    "physics-informed": 4.40511,
    "tabular-cancer": 0.05652,
}


def test_pinned_figures() -> None:
    """Final losses after fifty steps; another processor may differ in the last digits."""
    (adamw,) = optimizer_specs([], ["adamw-cosine"])
    for task, value in PINNED.items():
        found = run(RunSpec(task, adamw, 0.01, "test", 0, 50), DataOptions())
        assert final_loss(found) == pytest.approx(value, rel=1e-2), task
