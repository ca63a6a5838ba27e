"""Reports on rules: the measurements behind them, and that words and pages follow the numbers."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learned_optim import LearnedOptimizer, load_rule
from learned_optim.explain import _dependence, _figures, _histories, _runs, _words, explain
from learned_optim.explain._dependence import Dependence
from learned_optim.explain._histories import Curve
from learned_optim.explain._probe import Probe, rms, settled_step, typical
from learned_optim.meta.tasks import ModuleTask
from learned_optim.rules.classical import AdamConfig, AdamRule, SGDConfig, SGDRule
from tests.conftest import random_rule, trajectory


@pytest.mark.parametrize("name", ["horizon", "equivariant", "lstm", "adam"])
def test_a_probe_sees_the_rule_s_own_updates(name: str) -> None:
    rule = random_rule(name)
    probe = Probe(rule, (3, 4), total_steps=100)
    grads = list(torch.randn(4, 12, generator=torch.Generator().manual_seed(3)))
    # The tensor of a probe stays where it is, so only the first update is the trajectory's.
    (expected,) = trajectory(rule, grads[0].view(1, 3, 4), probe.param.view(3, 4))
    if rule.reads_horizon:
        expected = probe.alternatives(grads[:1])[0].view(3, 4)
    looked = probe.alternatives([grads[0], grads[1], grads[0]])
    assert torch.equal(looked[0], looked[2])  # the state is that before the alternatives
    assert not torch.equal(looked[0], looked[1])
    update = probe.advance(grads[0])
    assert torch.equal(update, looked[0])
    torch.testing.assert_close(update.view(3, 4), expected, rtol=1e-3, atol=1e-6)
    again = probe.advance(grads[0])
    assert torch.equal(again, update) == (name == "adam")  # repeated gradients: equal steps


def test_settled_steps_of_known_rules() -> None:
    sgd = settled_step(Probe(SGDRule(SGDConfig(lr=0.1)), scale=0.5), typical(1024))
    assert sgd == pytest.approx(0.1 / 0.5, rel=0.02)  # gradients of mean square 1
    adam = AdamRule(AdamConfig(lr=0.01, beta2=0.99))
    assert settled_step(Probe(adam, scale=1.0), typical(1024, 1.0)) == pytest.approx(0.01, rel=1e-3)
    noise = settled_step(Probe(adam, scale=1.0), typical(1024, 0.0), steps=300)
    assert noise == pytest.approx(0.01 * math.sqrt(0.1 / 1.9), rel=0.05)


def test_curves_of_adam_are_adam_s() -> None:
    found = _histories.curves(AdamRule(AdamConfig(lr=0.02)))
    assert set(found) == {
        "constant", "alternating", "noisy", "decaying", "suddenly large",
    }  # fmt: skip
    for curve in found.values():
        assert curve.descent["learned"] == pytest.approx(curve.descent["Adam"], rel=1e-3, abs=1e-6)
        assert curve.size["learned"] == pytest.approx(curve.size["Adam"], rel=1e-3)
    constant = found["constant"]
    # Without noise a gradient like all before is a full step.
    scale = Probe(AdamRule()).scale
    assert constant.size["learned"] == pytest.approx(0.02 / scale, rel=1e-3)
    assert constant.descent["learned"][-1] > constant.descent["learned"][0]


def test_shares_of_directions() -> None:
    numbers = {"part/fast": 0.3, "gain/fast": 1.0, "part/slow": 0.1, "gain/slow": -2.0, "step": 1.0}
    assert _figures.gain_shares(numbers) == pytest.approx({"fast": 0.75, "slow": -0.25})


def made_up_dependence() -> Dependence:
    return Dependence(
        scale={s: 0.1 * s for s in _dependence.SCALES},
        shape={"10": 0.1, "5x5": 0.4},
        signal={0.05: 0.02, 1.0: 0.2},
        signal_adam={0.05: 0.05, 1.0: 0.1},
        known=[0.1, 0.4, 0.2, 0.04],
        unknown=[0.3] * 40,
        horizon=4,
    )


def made_up_curve(learned: float) -> Curve:
    """Descent in proportion to the gradient, and four times as steep as the references'."""
    x = [-30.0, -3.0, -1.0, 0.0, 1.0, 3.0, 30.0]
    names = ("learned", "Adam", "RMSprop", "momentum")
    size = {name: learned if name == "learned" else 0.5 for name in names}
    descent = {
        name: [(4 if name == "learned" else 1) * size[name] * v for v in x] for name in names
    }
    return Curve(x, descent, size)


def test_words_follow_the_numbers() -> None:
    sizes = {"constant": 1.5, "alternating": 0.05, "noisy": 0.52, "decaying": 1.0}
    made_up = {name: made_up_curve(size) for name, size in sizes.items()}
    steps, noise, scale, length = _words.in_short(made_up, made_up_dependence())
    assert "3 times as large where gradients repeat, equal where they are noise and 0.1" in steps
    assert "its steps are 0.1 of those on gradients that repeat; Adam's are 0.5" in noise
    assert "gives steps 10 times as large" in scale
    assert "Told a length of 4 steps, it ends with a step of 0.1 of its largest" in length
    runs = {f"Adam {lr:g}": _runs.Watched([lr], {}) for lr in _runs.ADAM_LRS}
    layers = {"a": [{"step_ratio": 0.5}] * 2, "b": [{"step_ratio": 0.2}] * 2}
    (line,) = _words.of_run({"with total_steps": _runs.Watched([4.0, 2.0], layers), **runs})
    assert line.startswith("With total_steps, the final loss is 2; that of the best of 3 Adams ")
    assert "(0.001) is 0.001. " in line
    assert line.endswith("0.2 of the tensor for `b` and 0.5 for `a`.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("diagonal", ["histories.png", "dependence.png", "run.png", "gains.png"]),
        ("coordinatewise", ["histories.png", "dependence.png", "run.png", "gains.png"]),
        ("quadratic", ["histories.png", "dependence.png", "run.png"]),
    ],
)
def test_a_report(
    name: str, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind of rule, on fewer points and steps than usual."""
    monkeypatch.setattr(_histories, "_POINTS", 3)
    monkeypatch.setattr(_dependence, "LENGTH", 30)
    monkeypatch.setattr(_runs, "WATCHED_STEPS", 12)
    told: list[str] = []
    path = explain(name, tmp_path, progress=told.append)
    text = path.read_text()
    assert load_rule(name).fingerprint() in text
    assert re.findall(r"\]\((\w+\.png)\)", text) == images
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", *images}
    assert len(told) == 3
    assert not re.search(r"\bnan\b|\binf\b", text)


def test_a_watched_run_has_the_numbers_of_every_step() -> None:
    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 5, generator=generator)
        return x, x[:, :1] - x[:, 1:2]

    task = ModuleTask(lambda: torch.nn.Linear(5, 1), batches, torch.nn.functional.mse_loss)
    run = _runs.watch(task, lambda p: LearnedOptimizer(p, "diagonal", total_steps=8), 8)
    assert [len(numbers) for numbers in run.numbers.values()] == [8, 8]
    assert list(run.numbers) == ["weight", "bias"]
    assert [n["step"] for n in run.numbers["weight"]] == list(range(8))
    assert _runs.Watched([3.0] * 9 + [1.0], {}).final == 1.0


def test_rms() -> None:
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))
