"""Reports on rules: the measurements behind them, and that words and pages follow the numbers."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learned_optim import load_rule
from learned_optim.explain import _dependence, _figures, _histories, _report, _runs, _words
from learned_optim.explain._dependence import Dependence, Response
from learned_optim.explain._histories import Curve
from learned_optim.explain._network import (
    Recorded,
    input_names,
    record,
    without_input,
    without_unit,
)
from learned_optim.explain._probe import Probe, rms, settled_step, typical
from learned_optim.explain._runs import Trial, Watched, quick_trials
from learned_optim.meta.tasks import ModuleTask
from learned_optim.rules import _history as history
from learned_optim.rules.classical import AdamConfig, AdamRule, SGDConfig, SGDRule
from learned_optim.rules.horizon import HorizonRule
from tests.conftest import random_rule, trajectory

ROOT = Path(__file__).parent.parent


def small_task() -> ModuleTask:
    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 5, generator=generator)
        return x, x[:, :1] - x[:, 1:2]

    return ModuleTask(lambda: torch.nn.Linear(5, 1), batches, torch.nn.functional.mse_loss)


# ---- probes


@pytest.mark.parametrize("name", ["horizon", "equivariant", "lstm", "adam"])
def test_a_probe_sees_the_rule_s_own_updates(name: str) -> None:
    rule = random_rule(name)
    probe = Probe(rule, (3, 4), total_steps=100)
    grads = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    updates = torch.stack([probe.advance(grad).update for grad in grads])
    # The tensor of a probe stays where it is, so only the first update is the trajectory's.
    expected = trajectory(rule, grads.view(4, 3, 4), probe.param.view(3, 4))
    torch.testing.assert_close(updates[0].view(3, 4), expected[0])
    assert probe.step == 4
    looked = [probe.look(grads[0])[0].update for _ in range(2)]
    assert torch.equal(*looked)


def test_settled_steps_of_known_rules() -> None:
    sgd = settled_step(Probe(SGDRule(SGDConfig(lr=0.1)), scale=0.5), typical(1024))
    assert sgd == pytest.approx(0.1 / 0.5, rel=0.02)  # gradients of mean square 1
    adam = AdamRule(AdamConfig(lr=0.01, beta2=0.99))
    assert settled_step(Probe(adam, scale=1.0), typical(1024, 1.0)) == pytest.approx(0.01, rel=1e-3)
    noise = settled_step(Probe(adam, scale=1.0), typical(1024, 0.0), steps=300)
    assert noise == pytest.approx(0.01 * math.sqrt(0.1 / 1.9), rel=0.05)


def test_curves_of_adam_are_adam_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_histories, "_POINTS", 5)
    found = _histories.curves(AdamRule(AdamConfig(lr=0.02)))
    assert set(found) == {history.name for history in _histories.HISTORIES}
    for curve in found.values():
        assert curve.descent["learned"] == pytest.approx(curve.descent["Adam"], rel=1e-3, abs=1e-6)
        assert curve.size["learned"] == pytest.approx(curve.size["Adam"], rel=1e-3)
    constant = found["constant"]
    # Without noise a gradient like all before is a full step.
    scale = Probe(AdamRule()).scale
    assert constant.size["learned"] == pytest.approx(0.02 / scale, rel=1e-3)
    assert constant.at("learned", 3.0) > constant.at("learned", -3.0)


def test_responses_of_sgd_last_as_long_as_the_event() -> None:
    found = _dependence.responses(SGDRule(SGDConfig(lr=1.0)))
    impulse, step = found["impulse"].update["learned"], found["step"].update["learned"]
    assert impulse[0] == pytest.approx(3.0, rel=0.05)
    assert max(map(abs, impulse[1:])) < 1e-5
    assert step == pytest.approx([1.0] * len(step), rel=0.05)
    assert found["impulse"].network == []


# ---- networks


@pytest.mark.parametrize("name", ["horizon", "equivariant", "lstm"])
def test_an_input_held_at_its_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = random_rule(name)
    generator = torch.Generator().manual_seed(4)
    state = rule.init_state(torch.zeros(6))
    rows = {
        key: torch.zeros(6, state[key].shape[-1])
        for key in rule.network_state
    }  # fmt: skip
    width = len(input_names(rule))
    if isinstance(rule, HorizonRule):
        inputs = torch.randn(6, width, generator=generator)
        features = torch.rand(1, 6, history.MEASUREMENTS.start + 11, generator=generator)
        held = inputs.clone()
        for index in (0, width - 1):
            held[:, index] = 0.7
            monkeypatch.setattr(history, "network_inputs", lambda *_, x=inputs: x)
            edited, _ = without_input(rule, index, 0.7).respond(features, rows)
            monkeypatch.setattr(history, "network_inputs", lambda *_, x=held: x)
            expected, _ = rule.respond(features, rows)
            torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-6)
            held = inputs.clone()
        return
    features = torch.randn(1, 6, width, generator=generator)
    for index in (0, width - 1):
        held = features.clone()
        held[..., index] = 0.7
        edited, _ = without_input(rule, index, 0.7).respond(features, rows)
        expected, _ = rule.respond(held, rows)
        torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-6)


def test_a_unit_held_at_its_mean_no_longer_matters() -> None:
    rule = random_rule("horizon")
    own = without_unit(rule, 3, 0.25)
    x = torch.zeros(16)
    x[3] = 0.25
    y = x.clone()
    y[3] = -1.0
    torch.testing.assert_close(own.readout(y), rule.readout(x))


@pytest.mark.parametrize("name", ["horizon", "equivariant"])
def test_recording_changes_no_run(name: str) -> None:
    rule = random_rule(name)
    trial = Trial("small", small_task(), 6, True, 0)
    plain = trial.train(rule)
    seen: list[Recorded] = []
    losses = trial.train(rule, lambda optimizer: _recording(optimizer, seen))
    assert losses == pytest.approx(plain, rel=1e-4)
    assert len(seen) == 6
    whole = record(rule, [trial], rows=10**6)
    assert whole.inputs.shape[1] == len(input_names(rule))
    torch.testing.assert_close(whole.inputs, torch.cat([one.inputs for one in seen]))


def _recording(optimizer: object, seen: list[Recorded]) -> None:
    from learned_optim.explain._network import recording

    recording(optimizer, seen.append)  # type: ignore[arg-type]


# ---- words and pages


def test_words_follow_the_numbers() -> None:
    text = " ".join(_words.of_dependence(made_up_dependence()))
    assert "given steps 10 times as large" in text
    assert "from 0.1 of the scale (10) to 0.4 (5x5)" in text
    assert "steps are 0.1 of those on gradients that repeat; Adam's 0.5" in text
    assert "longest step at step 2 and ends at 0.1 of it" in text
    assert "fifth step is about as large as those" in text
    change = Response({"learned": [1.0, 0.5, 0.05], "Adam": [1.0, 0.5, 0.2]}, [], [])
    (line,) = _words.of_responses({"impulse": change})
    assert line.endswith("for 2 steps; with Adam for at least 3 steps.")


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


def test_in_short() -> None:
    sizes = {"constant": 1.5, "alternating": 0.05, "noisy": 0.52, "decaying": 1.0}
    made_up = {name: made_up_curve(size) for name, size in sizes.items()}
    steps, gradient, scale, length = _words.in_short(made_up, made_up_dependence())
    assert "longer (3 times) steps where gradients repeat" in steps
    assert "equal ones where they are noise and shorter (0.1 times) ones" in steps
    assert "counts 4 times as much as in Adam" in gradient
    assert "Steps grow with the tensor" in scale
    assert "by a factor of 10 where" in scale
    assert "told a length of 4 steps, the last is 0.1 of the longest" in length


@pytest.mark.slow
def test_a_short_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {history.name: made_up_curve(0.25) for history in _histories.HISTORIES}
    monkeypatch.setattr(_report, "curves", lambda _: made_up)
    monkeypatch.setattr(_report, "dependence", lambda _: made_up_dependence())
    for module in (_runs, _report):
        monkeypatch.setattr(module, "WATCHED_STEPS", 12)
    monkeypatch.setattr(_runs, "ADAM_LRS", (1e-2,))
    monkeypatch.setattr(_words, "ADAM_LRS", (1e-2,))
    told: list[str] = []
    path = _report.explain("diagonal", tmp_path, short=True, progress=told.append)
    text = path.read_text()
    assert load_rule("diagonal").fingerprint() in text
    images = re.findall(r"\]\((\w+\.png)\)", text)
    assert images == ["histories.png", "run.png", "gains.png", "dependence.png"]
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", *images}
    assert len(told) == 4
    assert "| constant | 0.25 | 0.5 | 0.5 | 0.5 |" in text


def test_a_watched_run_has_the_numbers_of_every_step() -> None:
    run = _runs.watch(small_task(), _runs._learned(load_rule("diagonal"), 8), 8)
    assert [len(numbers) for numbers in run.numbers.values()] == [8, 8]
    assert list(run.numbers) == ["weight", "bias"]
    assert [n["step"] for n in run.numbers["weight"]] == list(range(8))
    assert Watched([3.0] * 9 + [1.0], {}).final == 1.0


def test_quick_trials_are_the_same_for_all() -> None:
    one, other = quick_trials(1, 3)[0], quick_trials(1, 3)[0]
    rule = load_rule("diagonal")
    assert one.train(rule) == other.train(rule)
    assert one.log_final(rule) == pytest.approx(math.log(one.train(rule)[-1]))


def test_rms() -> None:
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))
