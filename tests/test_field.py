"""The field: its tasks, its protocol, and its figures worked out by hand."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rule

from learned_optim import load_rule, save_rule
from learned_optim.cli import main
from learned_optim.meta import DataOptions, field, runs
from learned_optim.meta.field import FIELD_LRS, FieldConfig, FieldEvaluation, measure
from learned_optim.meta.field_report import markdown, write_report
from learned_optim.meta.field_summary import Figures, final_loss, ratio, summarize
from learned_optim.meta.runs import OptimizerSpec, Run, RunSpec, learned_optimizer, state_bytes
from learned_optim.meta.seeding import seeded
from learned_optim.meta.statistics import geometric_mean, performance_profile, pooled
from learned_optim.meta.tasks import (
    TaskOptions,
    build_tasks,
    field_horizon,
    field_tasks,
    finetuning,
)

SMALL = FieldConfig(
    checkpoints=(), tasks=("regression", "matrix-factorization"), quick=True, seeds=2,
    baselines=("adamw-cosine", "adam-1e-3"),
)  # fmt: skip
#: Tasks whose data needs no folder of images.
WITHOUT_IMAGES = [
    name
    for name in field_tasks()
    if not name.startswith(("cifar10", "fashion", "autoencoder", "variational", "noisy"))
    and name != "finetune-convnet"
]


# ---- the tasks


def test_stated_steps() -> None:
    for name, found in field_tasks().items():
        assert 1000 <= found.steps <= 10_000, name
        assert 300 <= found.quick <= 1000, name
        # A run's losses are kept as means over a hundred stretches of equal length.
        assert found.steps % field.STRETCHES == found.quick % field.STRETCHES == 0


@pytest.mark.parametrize("name", sorted(field_tasks()))
def test_every_task_trains(name: str, request: pytest.FixtureRequest) -> None:
    """A few of Adam's steps lower the loss on one batch; the same seeds give the same numbers."""
    data = DataOptions() if name in WITHOUT_IMAGES else request.getfixturevalue("image_data")
    task = build_tasks(name, TaskOptions(data=data)).sample(seeded(0))
    first = {n: torch.nn.Parameter(p) for n, p in task.init(seeded(1)).items()}
    again = task.init(seeded(1))
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    batch = task.batch(seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, task.batch(seeded(2)), strict=True))
    before = task.loss(first, batch).item()
    # These two do not descend their loss: they have tests of their own.
    steps = 0 if name in ("policy-gradient", "adversarial-pair") else 15
    optimizer = torch.optim.Adam(first.values(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(first, batch).backward()
        optimizer.step()
    after = task.loss(first, batch).item()
    assert after < before or not steps
    figures = task.test({n: p.detach() for n, p in first.items()})
    assert math.isfinite(figures["loss"])
    assert 0.0 <= figures.get("accuracy", 0.0) <= 1.0
    with pytest.raises(ValueError, match="for evaluation only"):
        build_tasks(name, TaskOptions("meta", data))


def test_pendulum_by_hand() -> None:
    from learned_optim.meta.tasks.control import TORQUE, advance, observed

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
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(params, task.batch(generator)).backward()
        optimizer.step()
    assert before > 2.0
    assert task.test(params)["cost at the end"] < 0.2


def test_adversaries_have_each_their_own_gradient() -> None:
    """The discriminator's gradient is that of its loss alone, and the generator's likewise."""
    import torch.nn.functional as F

    from learned_optim.meta.tasks.adversarial import Adversaries, sliced_distance

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


@pytest.mark.parametrize("name", sorted({*field_tasks()} - {"lora-lm"}))  # as finetune-lm
def test_a_start_is_the_seeds_alone(name: str, request: pytest.FixtureRequest) -> None:
    """Whatever a process has drawn before: every optimizer gets the same weights and batches."""
    data = DataOptions() if name in WITHOUT_IMAGES else request.getfixturevalue("image_data")
    starts = []
    for drawn_before in range(2):
        finetuning._trained_convnet.cache_clear()
        finetuning._trained_transformer.cache_clear()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn_before)
            task = build_tasks(name, TaskOptions(data=data)).sample(seeded(0))
            starts.append([*task.init(seeded(1)).values(), *task.batch(seeded(2))])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_the_heat_equations_solution_solves_it() -> None:
    from learned_optim.meta.tasks.physics import DIFFUSION, solution, source

    places = torch.rand(50, 2, dtype=torch.float64, requires_grad=True)
    u = solution(places)
    (slopes,) = torch.autograd.grad(u.sum(), places, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes[:, 1].sum(), places)
    residual = slopes[:, 0] - DIFFUSION * curvatures[:, 1] + u**3 - source(places)
    assert residual.abs().max() < 1e-12


def test_adapters_start_as_the_network_they_adapt() -> None:
    from learned_optim.meta.tasks.finetuning import with_adapters

    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    adapted = with_adapters(base)
    x = torch.randn(5, 6)
    torch.testing.assert_close(adapted(x), base(x))
    names = {name for name, _ in adapted.named_parameters()}
    assert names == {"0.down", "0.up", "2.down", "2.up"}
    assert all(p.requires_grad for p in base.parameters())


def test_rare_classes_are_rare() -> None:
    task = build_tasks("rare-classes").sample(seeded(0))
    labels = torch.cat([task.batch(seeded(i))[1] for i in range(100)])
    counts = torch.bincount(labels, minlength=200)
    assert counts[0] > 20 * counts[50:100].double().mean()


# ---- figures by hand


def test_geometric_mean_by_hand() -> None:
    assert geometric_mean([0.5, 2.0])["mean"] == pytest.approx(1.0)
    # Resampling two values gives both ends with a chance of a quarter each.
    assert geometric_mean([0.5, 2.0])["low"] == pytest.approx(0.5)
    assert geometric_mean([0.5, 2.0])["high"] == pytest.approx(2.0)
    assert geometric_mean([3.0]) == {"mean": pytest.approx(3.0), "low": None, "high": None}


def test_performance_profile_by_hand() -> None:
    costs = {"a": [1.0, 4.0, math.inf], "b": [2.0, 1.0, math.inf]}
    assert performance_profile(costs, [1.0, 2.0, 4.0]) == {
        "a": pytest.approx([1 / 3, 1 / 3, 2 / 3]),
        "b": pytest.approx([1 / 3, 2 / 3, 2 / 3]),
    }


def test_pooled_by_hand() -> None:
    assert pooled([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert pooled([1.0, 2.0], 5) == [1.0, 2.0]
    assert pooled([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert pooled([1.0, math.inf], 1) == [math.inf]


def test_ratios_are_cut_off_and_divergence_counts() -> None:
    one = torch.ones(2)
    assert ratio(3 * one, 2 * one) == 1.5
    assert ratio(one, 100 * one) == 0.1
    assert ratio(torch.tensor([1.0, math.inf]), one) == 10.0
    assert ratio(one, math.inf * one) == 0.1


def spec(label: str, kind: Any = "baseline") -> OptimizerSpec:
    return OptimizerSpec(label, kind, label, label)


def figures(label: str, losses: list[float], seconds: float = 1.0) -> Figures:
    """One seed's figures over 100 steps."""
    done = Run(losses, seconds if math.isfinite(losses[-1]) else math.inf, {}, 0.5, 64)
    return Figures.of(spec(label), 0.1, 100, [done])


def test_summary_by_hand() -> None:
    """A rival falls at step 50, another at 25; one stalls, one diverges."""
    everybody = {
        "rival": figures("rival", [2.0] * 10 + [1.0] * 10),
        "fast": figures("fast", [2.0] * 5 + [0.5] * 15, seconds=4.0),
        "stuck": figures("stuck", [2.0] * 19 + [1.95]),
        "gone": figures("gone", [2.0] * 10 + [math.inf] * 10),
    }
    found = summarize({"t": everybody}, ["rival"], ["fast", "stuck", "gone"])
    rows = found["tasks"]["t"]["optimizers"]
    assert found["tasks"]["t"]["best_tuned"] == "rival"
    assert found["tasks"]["t"]["best_untuned"] == "fast"
    # The last 5 % of twenty stretches are one; its mean is the final loss.
    assert final_loss(Run([3.0] * 19 + [1.0], 1.0, {})) == 1.0
    assert rows["fast"]["ratio"]["mean"] == 0.5
    assert rows["fast"]["sum"]["mean"] == pytest.approx(100 * (5 * 2.0 + 15 * 0.5) / 20)
    assert (rows["rival"]["steps_to_target"], rows["fast"]["steps_to_target"]) == (55.0, 30.0)
    assert rows["fast"]["seconds_to_target"] == pytest.approx(30 * 4.0 / 100)
    assert rows["stuck"]["steps_to_target"] is None
    assert (rows["stuck"]["stalled"], rows["stuck"]["diverged"]) == (1, 0)
    assert (rows["gone"]["stalled"], rows["gone"]["diverged"]) == (0, 1)
    assert rows["fast"]["optimizer_milliseconds"]["mean"] == pytest.approx(5.0)
    overall = found["overall"]
    assert overall["fast"]["ratio"]["mean"] == pytest.approx(0.5)
    assert overall["gone"]["ratio"]["mean"] == pytest.approx(10.0)
    assert (overall["gone"]["diverged"], overall["stuck"]["stalled"]) == (1.0, 1.0)
    assert overall["fast"]["step_share_to_target"] == pytest.approx(0.3)
    # In units of the rival's whole run: 30 steps of 40 ms against 100 of 10 ms.
    assert overall["fast"]["second_share_to_target"] == pytest.approx(1.2)
    assert overall["fast"]["state_bytes"] == 64
    assert found["untuned_pairs"]["stuck"]["fast"]["mean"] == pytest.approx(3.9)
    profile = found["profiles"]["all"]
    assert (profile["fast"][0], profile["rival"][0], profile["gone"][-1]) == (1.0, 0.0, 0.0)
    json.dumps(found, allow_nan=False)


def test_state_bytes_by_hand() -> None:
    param = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.Adam([param])
    assert state_bytes(optimizer) == 0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 15 * 4 + 4  # two moments and the step


# ---- pinned: a tier of seconds

PINNED = {
    ("regression", "adamw-cosine", 0): 0.45446,
    ("regression", "prodigy-cosine", 0): 0.42992,
    ("matrix-factorization", "adamw-cosine", 0): 1.06624,
    ("matrix-factorization", "prodigy-cosine", 0): 1.05981,
    ("physics-informed", "adamw-cosine", 0): 4.40511,
    ("physics-informed", "prodigy-cosine", 0): 4.35336,
    ("tabular-cancer", "adamw-cosine", 0): 0.05652,
    ("tabular-cancer", "prodigy-cosine", 0): 0.06373,
}


def test_pinned_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Final losses after fifty steps; another processor may differ in the last digits."""
    short = {name: replace(found, quick=50) for name, found in field_tasks().items()}
    monkeypatch.setattr("learned_optim.meta.tasks._registry.field_tasks", lambda: short)
    found = measure(
        {"adamw-cosine": "baseline:adamw-cosine@0.01", "prodigy-cosine": "baseline:prodigy-cosine"},
        ["regression", "matrix-factorization", "physics-informed", "tabular-cancer"],
    )
    assert found == {key: pytest.approx(value, rel=1e-2) for key, value in PINNED.items()}


def test_measure_takes_checkpoints_functions_and_names(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)
    told: list[int] = []

    def made(params: list[torch.Tensor], total_steps: int) -> torch.optim.Optimizer:
        told.append(total_steps)
        return torch.optim.SGD(params, lr=0.01)

    found = measure({"file": str(path), "mine": made}, ["regression"])
    assert set(found) == {("regression", "file", 0), ("regression", "mine", 0)}
    assert told == [field_horizon("regression").quick]
    with pytest.raises(ValueError, match="has no learning rate of its own: say adamw@LR"):
        measure({"x": "baseline:adamw"}, ["regression"])


def test_learned_optimizers_are_told_the_steps_if_their_rule_asks() -> None:
    for name, told in (("coordinatewise", None), ("diagonal", 700)):
        group = learned_optimizer([torch.zeros(1)], load_rule(name), 700).param_groups[0]
        assert (group["lr"], group["total_steps"], group["warmup"]) == (1.0, told, 0)


# ---- the protocol


Losses = Callable[[RunSpec], list[float]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Losses], list[RunSpec]]:
    """Replaces training by given losses; the list returned fills with the runs asked for."""

    def install(losses: Losses) -> list[RunSpec]:
        asked: list[RunSpec] = []

        def run(spec: RunSpec, data: DataOptions) -> Run:
            asked.append(spec)
            values = losses(spec)
            good = math.isfinite(values[-1])
            return Run(values, 1.0 if good else math.inf, {"loss": 1.0} if good else {}, 0.25, 8)

        monkeypatch.setattr(runs, "run", run)
        return asked

    return install


def test_protocol(scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path) -> None:
    """Tuning by the final loss, other seeds in the test, the next best where that diverges."""

    def losses(spec: RunSpec) -> list[float]:
        if spec.optimizer.label == "adam-1e-3":
            return [2.0] * 10 + [1.0] * 90
        final = {0.01: 0.5, 0.003: 0.8}.get(spec.lr, 1.5)
        if spec.lr == 0.01 and (spec.task, spec.phase, spec.seed) == ("regression", "test", 1):
            final = math.inf
        return [0.1] * 95 + [final] * 5  # the sum says nothing of the end

    asked = scripted(losses)
    seen: list[tuple[int, int, str]] = []
    config = replace(SMALL, output=tmp_path / "out")
    summary = FieldEvaluation(config, lambda *report: seen.append(report)).execute()
    tasks = summary["tasks"]
    assert tasks["matrix-factorization"]["optimizers"]["adamw-cosine"]["lr"] == 0.01
    assert tasks["regression"]["optimizers"]["adamw-cosine"]["lr"] == 0.003
    assert tasks["regression"]["optimizers"]["adam-1e-3"]["ratio"]["mean"] == 1 / 0.8
    assert {s.steps for s in asked if s.task == "regression"} == {field_horizon("regression").quick}
    tuning = [s for s in asked if s.phase == "tune"]
    assert sorted({s.lr for s in tuning}) == sorted(FIELD_LRS)
    assert len(tuning) == 2 * len(FIELD_LRS)
    # Every task is tried before any is tried again, and the time left is told.
    assert [s.task for s in asked[:2]] == list(SMALL.tasks)
    assert "min left" in seen[-1][2]
    assert seen[0] == (0, 2, "checking regression")
    # Everything is in the log, with at most a hundred losses for a run.
    asked.clear()
    assert FieldEvaluation(config).execute() == summary
    assert asked == []
    text = markdown(summary)
    assert "## Untuned against tuned" in text
    assert "| adamw-cosine (0.003) |" in text
    assert [p.name for p in write_report(summary, config.output)] == ["table.md", "profile.png"]


def test_long_runs_are_kept_short(tmp_path: Path) -> None:
    evaluation = FieldEvaluation(replace(SMALL, tasks=("regression",), output=tmp_path))
    adam = next(o for o in evaluation.optimizers if o.label == "adam-1e-3")
    whole = RunSpec("regression", adam, 1e-3, "test", 0, 300)
    long, short = runs.run(whole, DataOptions()), field.run_pooled(whole, DataOptions())
    assert (len(long.losses), len(short.losses)) == (300, field.STRETCHES)
    assert sum(long.losses) / 300 == pytest.approx(sum(short.losses) / field.STRETCHES)
    assert 0.0 < short.optimizer_seconds < short.seconds
    assert short.state_bytes == 2 * 4 * 385 + 4 * 4


def test_diverging_runs_count(scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path) -> None:
    scripted(lambda spec: [1.0] * 50 + [math.inf if spec.lr == 1e-3 else 1.0] * 50)
    config = replace(SMALL, baselines=("adam-1e-3", "adamw-cosine"), output=tmp_path)
    summary = FieldEvaluation(config).execute()
    assert summary["overall"]["adam-1e-3"]["diverged"] == 1.0
    assert summary["overall"]["adam-1e-3"]["ratio"]["mean"] == pytest.approx(10.0)
    assert "| 2 diverged |" in markdown(summary)
    # Nobody alive: still a summary, tables and a plot.
    scripted(lambda spec: [math.inf] * 100)
    everything = FieldEvaluation(replace(config, output=tmp_path / "all")).execute()
    assert len(write_report(everything, tmp_path / "all")) == 2


def test_rival_without_its_package(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(lambda spec: [1.0] * 100)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    config = replace(SMALL, baselines=("adam-1e-3", "prodigy"), output=tmp_path)
    summary = FieldEvaluation(config).execute()
    assert list(summary["protocol"]["skipped"]) == ["prodigy"]
    text = markdown(summary)
    assert "Without prodigy: the baseline 'prodigy' needs its package: install the extra" in text
    assert "No tuned rival took part." in text
    with pytest.raises(ValueError, match="at least one optimizer whose package is installed"):
        FieldEvaluation(replace(config, baselines=("prodigy",)))


def test_errors_come_before_any_run(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(lambda spec: pytest.fail("a run before the error"))
    config = replace(SMALL, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"'mnist' is not of the field.* Known: .*regression"):
        FieldEvaluation(replace(config, tasks=("mnist",)))
    with pytest.raises(ValueError, match=r"unknown baseline 'adan'; known: "):
        FieldEvaluation(replace(config, baselines=("adan",)))
    gone = DataOptions(text=tmp_path / "none.txt")
    for task in ("char-lm-tied", "skip-gram"):
        with pytest.raises(FileNotFoundError, match=r"no text file at .*none\.txt: --text names"):
            FieldEvaluation(replace(config, tasks=("regression", task), data=gone))
    (tmp_path / "own_field.py").write_text(
        "import torch\n"
        "from learned_optim.meta.tasks import FixedTask, Horizon, ModuleTask\n"
        "nan = torch.full((4, 1), float('nan'))\n"
        "broken = ModuleTask(lambda: torch.nn.Linear(1, 1), lambda g: (nan, nan), "
        "torch.nn.functional.mse_loss)\n"
        "FAMILIES = {'broken': lambda options: FixedTask(broken)}\n"
        "FIELD = {'broken': Horizon(1000, 300)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'own_field:broken': the loss is nan at the initial"):
        FieldEvaluation(replace(config, tasks=("own_field:broken",)))
    with pytest.raises(ValueError, match=r"'own_field:other' is not of the field.* Known: broken"):
        FieldEvaluation(replace(config, tasks=("own_field:other",)))
    assert asked == []
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("regression", "regression")}, "tasks names something twice: regression"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1, got 0"),
        ({"seeds": -1}, "seeds must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_usual_values_of_the_tiers() -> None:
    whole, quick = FieldConfig().filled(), FieldConfig(quick=True).filled()
    assert whole.tasks == quick.tasks == tuple(field_tasks())
    assert (whole.seeds, quick.seeds) == (3, 2)
    assert set(quick.baselines) < set(whole.baselines)
    assert {"adamw-cosine", "prodigy-cosine", "nadamw-1.75e-3"} <= set(quick.baselines)


def test_tiny_data_is_refused() -> None:
    from learned_optim.meta.tasks._examples import Examples

    with pytest.raises(ValueError, match="20 examples leave 16 to train on and 4 held out"):
        Examples(torch.zeros(20, 2), torch.zeros(20)).split()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "evaluate", "--suite", "field", "--quick", "--checkpoints", "--tasks", "regression",
        "--baselines", "adam-1e-3", "muon-cosine-2e-2", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    assert (
        "| optimizer | final loss / best tuned | held-out loss | best untuned on |" in captured.out
    )
    written = (tmp_path / "out" / "table.md").read_text()
    assert "1 task (quick tier), 2 test seeds" in written
    assert f"wrote {tmp_path / 'out' / 'profile.png'}\n" in captured.out
    assert "left" in captured.err
    assert main(["evaluate", "--suite", "nonesuch"]) == 1
    assert "unknown suite 'nonesuch'; known: tasks, field" in capsys.readouterr().err
    assert main(["evaluate", "--suite=field", "--help"]) == 0
    options = capsys.readouterr().out
    assert "--quick" in options
    assert "--horizons" not in options
