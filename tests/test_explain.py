"""Reports on rules: measurements of known rules, and words and pages that follow the numbers."""

import math
import re
from pathlib import Path

import pytest
import torch

from learned_optim import load_rule
from learned_optim.explain import _figures, _probe, explain
from learned_optim.explain._probe import Curve, Dependence, Probe
from learned_optim.rules.classical import AdamConfig, AdamRule, SGDConfig, SGDRule
from tests.conftest import random_rule, trajectory


@pytest.mark.parametrize("name", ["equivariant", "lstm", "adam"])
def test_a_probe_sees_the_rule_s_own_updates(name: str) -> None:
    rule = random_rule(name)
    probe = Probe(rule, (3, 4), total_steps=100)
    grads = list(torch.randn(4, 12, generator=torch.Generator().manual_seed(3)))
    looked = probe.alternatives([grads[0], grads[1], grads[0]])
    assert torch.equal(looked[0], looked[2])  # the state is that before the alternatives
    assert not torch.equal(looked[0], looked[1])
    update = probe.advance(grads[0])
    assert torch.equal(update, looked[0])
    # The tensor of a probe stays where it is, so only the first update is the trajectory's.
    (expected,) = trajectory(rule, grads[0].view(1, 3, 4), probe.param.view(3, 4))
    torch.testing.assert_close(update.view(3, 4), expected, rtol=1e-3, atol=1e-6)
    again = probe.advance(grads[0])
    assert torch.equal(again, update) == (name == "adam")  # repeated gradients: equal steps


def test_settled_steps_of_known_rules() -> None:
    sgd = Probe(SGDRule(SGDConfig(lr=0.1)), scale=0.5)
    assert sgd.typical_step() == pytest.approx(0.1 / 0.5, rel=0.02)  # gradients of mean square 1
    adam = Probe(AdamRule(AdamConfig(lr=0.01, beta2=0.9)), scale=1.0)
    assert adam.typical_step(signal=1.0) == pytest.approx(0.01, rel=1e-3)


def test_curves_of_adam_are_adam_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "_POINTS", 5)
    for name, curve in _probe.curves(AdamRule(AdamConfig(lr=0.02))).items():
        assert curve.descent["learned"] == pytest.approx(curve.descent["Adam"], rel=1e-3, abs=1e-6)
        assert curve.size["learned"] == pytest.approx(curve.size["Adam"], rel=1e-3)
        if name == "constant":  # a gradient like all before is a full step
            assert curve.size["learned"] == pytest.approx(0.02 / Probe(AdamRule()).scale, rel=1e-3)


def test_shares_of_directions() -> None:
    numbers = {"part/fast": 0.3, "gain/fast": 1.0, "part/slow": 0.1, "gain/slow": -2.0, "step": 1.0}
    assert _figures.gain_shares(numbers) == pytest.approx({"fast": 0.75, "slow": -0.25})


def test_words_follow_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"constant": 1.5, "alternating": 0.05, "noisy": 0.52, "suddenly large": 1.0}
    x = [-30.0, -3.0, -1.0, 0.0, 1.0, 3.0, 30.0]
    curves = {}
    for name, learned in sizes.items():
        size = {"learned": learned, "Adam": 0.5, "RMSprop": 0.5, "momentum": 0.5}
        curves[name] = Curve(x, {rule: [s * v for v in x] for rule, s in size.items()}, size)
    dependence = Dependence(
        scale={s: 0.1 * s for s in _probe.SCALES},
        shape={"10": 0.1, "5x5": 0.4},
        signal={0.05: 0.02, 1.0: 0.2},
        signal_adam={0.05: 0.05, 1.0: 0.1},
        known=[0.1, 0.4, 0.2, 0.04],
        unknown=[0.3] * 40,
    )
    layers = {
        name: [{"step_ratio": ratio, "effective_lr": ratio, "part/g": 1.0, "gain/g": 1.0}] * 2
        for name, ratio in (("a", 0.5), ("b", 0.2))
    }
    runs = {"with total_steps": _probe.Watched([4.0, 2.0], layers)}
    runs |= {f"Adam {lr:g}": _probe.Watched([lr], {}) for lr in _probe.ADAM_LRS}
    monkeypatch.setattr(_probe, "curves", lambda _: curves)
    monkeypatch.setattr(_probe, "dependence", lambda _: dependence)
    monkeypatch.setattr(_probe, "watch_digits", lambda _: runs)
    text = explain("default-fast", tmp_path).read_text()
    for words in (
        "3 times as large where gradients repeat, equal where they are noise and 0.1",
        "its steps are 0.1 of those on gradients that repeat; Adam's are 0.5",
        "gives steps 10 times as large",
        "Told a length of 4 steps, it ends with a step of 0.1 of its largest",
        "With total_steps, the final loss is 2; that of the best of 3 Adams (0.001) is 0.001. ",
        "0.2 of the tensor for `b` and 0.5 for `a`.",
    ):
        assert words in text, words


@pytest.mark.parametrize(("name", "images"), [("diagonal", 4), ("quadratic", 3)])
def test_a_report(name: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rule with several directions and of one with a single one, on few points and steps."""
    monkeypatch.setattr(_probe, "SETTLED", 20)
    monkeypatch.setattr(_probe, "_POINTS", 3)
    monkeypatch.setattr(_probe, "LENGTH", 30)
    monkeypatch.setattr(_probe, "WATCHED_STEPS", 12)
    reported: list[str] = []
    text = explain(name, tmp_path, progress=reported.append).read_text()
    assert load_rule(name).fingerprint() in text
    shown = ["histories.png", "dependence.png", "run.png", "gains.png"][:images]
    assert re.findall(r"\]\((\w+\.png)\)", text) == shown
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", *shown}
    assert len(reported) == 3
    assert not re.search(r"\bnan\b|\binf\b", text)
    assert math.isfinite(float(re.search(r"the final loss is (\S+);", text)[1]))
