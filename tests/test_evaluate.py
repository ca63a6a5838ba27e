"""The evaluation protocol: pairing, tuning, resuming, and figures worked out by hand."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rule
from PIL import Image

from learned_optim import save_rule
from learned_optim._card import plot_curves
from learned_optim.meta import DataOptions, EvaluateConfig, Evaluation, build_tasks, runs
from learned_optim.meta import evaluate as evaluate_module
from learned_optim.meta.baselines import BASELINES, LR_GRID, make_baseline
from learned_optim.meta.report import brief, markdown, plot, table, write_report
from learned_optim.meta.runs import Run, RunSpec
from learned_optim.meta.statistics import curve, interval, median, ratio_interval, smooth
from learned_optim.rules import _config, rule_names
from learned_optim.rules.classical import AdamConfig, AdamRule

NOTHING_LEARNED = EvaluateConfig(
    checkpoints=(), tasks=("quadratic",), baselines=("sgd", "adam"), horizons=(20,),
    seeds=2, tuning_seeds=1,
)  # fmt: skip


@pytest.fixture
def adam_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint whose behaviour is known: Adam at lr 0.1 as an update rule."""
    path = tmp_path / "handmade.safetensors"
    save_rule(AdamRule(AdamConfig(lr=0.1)), path)
    return path


Losses = Callable[[RunSpec], list[float]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Losses], list[RunSpec]]:
    """Replaces training by given losses; the list returned fills with the runs asked for."""

    def install(losses: Losses) -> list[RunSpec]:
        asked: list[RunSpec] = []

        def run(spec: RunSpec, data: DataOptions) -> Run:
            asked.append(spec)
            values = losses(spec)
            good = all(map(math.isfinite, values))
            return Run(values, 0.5 if good else math.inf, {"accuracy": 0.75} if good else {})

        monkeypatch.setattr(runs, "run", run)
        return asked

    return install


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary less what a clock measured."""
    if isinstance(summary, dict):
        clock = ("milliseconds_per_step", "seconds_to_best")
        return {k: without_times(v) for k, v in summary.items() if k not in clock}
    return summary


# ---- the figures


def test_interval_by_hand() -> None:
    # Student's t at 97.5 % with 2 degrees of freedom is 4.302653; the deviation of 1, 2, 3 is 1.
    result = interval(torch.tensor([1.0, 2.0, 3.0]))
    assert result == {"mean": 2.0, "half": pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)}
    assert interval(torch.tensor([1.0, math.inf])) == {"mean": None, "half": None}


def test_ratio_interval_by_hand() -> None:
    # Resampling the pairs (1, 1) and (3, 1) gives 1, 2 and 3 with chances 1/4, 1/2 and 1/4.
    result = ratio_interval(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    assert result == {"mean": 2.0, "low": 1.0, "high": 3.0}
    # Pairing matters: where every pair has the same ratio there is nothing uncertain about it.
    theirs = torch.tensor([1.0, 10.0, 100.0])
    result = ratio_interval(0.5 * theirs, theirs)
    assert result == {k: pytest.approx(0.5) for k in ("mean", "low", "high")}
    diverged = ratio_interval(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 1.0]))
    assert diverged["mean"] is None


def test_median_by_hand() -> None:
    assert median(torch.tensor([7.0, 1.0, 3.0])) == 3.0
    assert median(torch.tensor([7.0, 1.0, 3.0, 4.0])) == 3.5
    # Half of the seeds never got there: so did the median.
    assert median(torch.tensor([1.0, math.inf, 2.0, math.inf])) == math.inf
    assert median(torch.tensor([1.0, 2.0, math.inf])) == 2.0


def test_smooth_by_hand() -> None:
    found = smooth(torch.arange(12.0)[None])[0].tolist()
    assert found == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.5, 6.5]


def test_curve_by_hand() -> None:
    losses = torch.stack((torch.arange(401.0), torch.arange(401.0) + 2.0)).double()
    found = curve(losses)
    assert len(found["step"]) == 133  # stretches of 3 steps; at most 200 points
    assert found["step"][:2] == [1.0, 4.0]
    assert found["mean"][:2] == [2.0, 5.0]
    # Two values 2 apart: deviation sqrt(2), t at 1 degree of freedom 12.7062, so half is 12.7062.
    assert found["half"][0] == pytest.approx(12.706, rel=1e-4)
    assert curve(torch.ones(2, 200).double())["step"] == [float(i) for i in range(200)]


def test_figures_by_hand(scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path) -> None:
    """Thirty steps: the learned optimizer falls as 30 - t, the baseline stays at 15.5.

    At another learning rate the baseline is worse in sum and ends lower, at 10.5.
    """
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)

    def losses(spec: RunSpec) -> list[float]:
        if spec.optimizer.kind == "learned":
            return [float(30 - t) for t in range(30)]
        if spec.lr == 0.3:
            return [25.0] * 20 + [10.5] * 10
        return [15.5 if spec.lr == 0.1 else 99.0] * 30

    scripted(losses)
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(path),), baselines=("sgd",), horizons=(20, 30)
    )
    summary = Evaluation(replace(config, output=tmp_path)).execute()
    whole = summary["tasks"]["quadratic"]["horizons"]["30"]
    row, sgd = whole["optimizers"]["rule"], whole["optimizers"]["sgd"]
    assert whole["best_baseline"] == "sgd"
    assert sgd["lr"] == sgd["tuned_lr"] == 0.1
    assert sgd["tuned_by_final"]["lr"] == 0.3
    assert not sgd["lr_at_edge"]
    assert row["sum"] == {"mean": 465.0, "half": 0.0}
    assert row["last"] == {"mean": 5.5, "half": 0.0}
    assert row["ratio"]["mean"] == pytest.approx(1.0)
    assert row["ratio_last"]["mean"] == pytest.approx(5.5 / 15.5)
    # The mean of ten falling losses, 34.5 - t, is down to 10.5 at t = 24: after 25 steps.
    assert row["steps_to_best"] == 25
    assert row["seconds_to_best"] == pytest.approx(25 * 0.5 / 30)
    assert sgd["steps_to_best"] is None  # the baseline tuned by its sum never gets there
    assert row["milliseconds_per_step"]["mean"] == pytest.approx(1000 * 0.5 / 30)
    assert row["test"]["accuracy"]["mean"] == 0.75
    assert row["diverged"] == 0
    assert "worst_after_1000" not in row
    part = summary["tasks"]["quadratic"]["horizons"]["20"]["optimizers"]["rule"]
    assert part["sum"]["mean"] == sum(range(11, 31))
    assert part["last"]["mean"] == 15.5
    assert "test" not in part


def test_long_runs_report_the_worst_loss_after_step_1000(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    def losses(spec: RunSpec) -> list[float]:
        values = [5.0] * 500 + [1.0] * 700
        values[1100] = 21.0  # in a mean of ten: 3
        return values

    scripted(losses)
    config = replace(NOTHING_LEARNED, horizons=(1000, 1200), output=tmp_path)
    horizons = Evaluation(config).execute()["tasks"]["quadratic"]["horizons"]
    assert horizons["1200"]["optimizers"]["adam"]["worst_after_1000"] == {"mean": 3.0, "half": 0.0}
    assert "worst_after_1000" not in horizons["1000"]["optimizers"]["adam"]
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert "| worst mean of ten after step 1,000 |" in markdown(saved)


# ---- the protocol


def test_everybody_sees_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Initial parameters and batches depend on phase and seed, never on the optimizer or lr."""
    seen: dict[tuple[object, ...], list[torch.Tensor]] = {}
    current: list[torch.Tensor] = []

    class Recording:
        def __init__(self, task: Any) -> None:
            self.task = task

        def sample(self, generator: torch.Generator) -> "Recording":
            return Recording(self.task.sample(generator))

        def init(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
            params = self.task.init(generator)
            current.extend(p.clone() for p in params.values())
            return params

        def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
            batch = self.task.batch(generator)
            current.extend(batch)
            return batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.task, name)

    real = runs.run

    def recorded(spec: RunSpec, data: DataOptions) -> Run:
        current.clear()
        result = real(spec, data)
        seen[spec.optimizer.label, spec.lr, spec.phase, spec.seed] = list(current)
        return result

    monkeypatch.setattr(
        runs, "build_tasks", lambda name, options: Recording(build_tasks(name, options))
    )
    monkeypatch.setattr(runs, "run", recorded)
    monkeypatch.setattr(evaluate_module, "LR_GRID", (0.03, 0.1))
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)
    config = EvaluateConfig(
        checkpoints=(str(path),), tasks=("digits-torch",), baselines=("sgd", "adam"),
        horizons=(10,), seeds=2, tuning_seeds=2, output=tmp_path,
    )  # fmt: skip
    Evaluation(config).execute()
    groups: dict[tuple[object, object], list[list[torch.Tensor]]] = {}
    for (_, _, phase, seed), record in seen.items():
        groups.setdefault((phase, seed), []).append(record)
    assert {key: len(group) for key, group in groups.items() if key[0] == "tune"} == {
        ("tune", 0): 4, ("tune", 1): 4,
    }  # fmt: skip
    assert {label for label, _, phase, _ in seen if phase == "test"} == {"rule", "sgd", "adam"}
    for group in groups.values():
        assert len(group[0]) == 4 + 10 * 2  # parameters, then ten batches of images and labels
        for record in group[1:]:
            for a, b in zip(record, group[0], strict=True):
                assert torch.equal(a, b)
    firsts = [group[0] for group in groups.values()]
    assert len(firsts) == 4  # two tuning seeds and two test seeds, all different
    for index, one in enumerate(firsts):
        for other in firsts[:index]:
            assert not torch.equal(one[0], other[0])
            assert not torch.equal(one[4], other[4])


def test_the_same_optimizer_twice(monkeypatch: pytest.MonkeyPatch, adam_checkpoint: Path) -> None:
    """Adam under two names, and as an update rule run like a learned one."""
    monkeypatch.setitem(BASELINES, "adam-again", BASELINES["adam"])
    monkeypatch.setattr(evaluate_module, "LR_GRID", (0.01, 0.1))
    config = replace(
        NOTHING_LEARNED,
        checkpoints=(str(adam_checkpoint),),
        baselines=("adam", "adam-again"),
        output=adam_checkpoint.parent,
    )
    cell = Evaluation(config).execute()["tasks"]["quadratic"]["horizons"]["20"]
    rows = without_times(cell["optimizers"])
    assert rows["adam"] == rows["adam-again"]
    assert rows["adam"]["lr"] == 0.1
    assert rows["handmade"]["sum"]["mean"] == pytest.approx(rows["adam"]["sum"]["mean"], rel=1e-4)
    assert rows["handmade"]["ratio"]["mean"] == pytest.approx(1.0, rel=1e-4)


def test_tuned_lr_is_the_argmin(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    """By the sum 0.3 is best on average (not on every seed); by the last ten steps 0.01 is."""

    def losses(spec: RunSpec) -> list[float]:
        if spec.lr == 0.3:
            return [1.0 if spec.seed else 2.0] * 20
        if spec.lr == 0.01:
            return [4.0] * 10 + [0.5] * 10
        if spec.lr == 10.0:  # best until it diverges
            return [0.1] * 19 + [math.inf]
        return [1.8] * 20

    asked = scripted(losses)
    config = replace(NOTHING_LEARNED, baselines=("sgd",), tuning_seeds=2, output=tmp_path)
    evaluation = Evaluation(config)
    row = evaluation.execute()["tasks"]["quadratic"]["horizons"]["20"]["optimizers"]["sgd"]
    assert row["lr"] == 0.3
    assert row["tuned_by_final"]["lr"] == 0.01
    assert row["tuned_by_final"]["last"]["mean"] == 0.5
    sgd = evaluation.optimizers[0]
    assert evaluation.ranked_lrs("quadratic", sgd, 10)[0] == 10.0
    assert 10.0 not in evaluation.ranked_lrs("quadratic", sgd, 20)
    tuning = [spec for spec in asked if spec.phase == "tune"]
    assert sorted({spec.lr for spec in tuning}) == list(LR_GRID)
    assert len(tuning) == 2 * len(LR_GRID)
    assert {(spec.lr, spec.seed) for spec in asked if spec.phase == "test"} == {
        (lr, seed) for lr in (0.01, 0.3) for seed in (0, 1)
    }


def test_grid_is_one_and_three_times_powers_of_ten() -> None:
    expected = [m * 10.0**k for k in range(-5, 1) for m in (1, 3)] + [10.0]
    assert list(LR_GRID) == pytest.approx(expected)


def test_diverged_runs_are_infinite() -> None:
    evaluation = Evaluation(replace(NOTHING_LEARNED, baselines=("sgd",)))
    spec = RunSpec("quadratic", evaluation.optimizers[0], 10.0, "test", 0, 100)
    run = runs.run(spec, DataOptions())
    first = run.losses.index(math.inf)
    assert 0 < first < 100
    assert run.losses[first:] == [math.inf] * (100 - first)
    assert run.seconds == math.inf
    assert run.test == {}


def test_a_diverged_optimizer_is_never_best(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    def losses(spec: RunSpec) -> list[float]:
        if spec.optimizer.label == "sgd" and spec.phase == "test" and spec.seed == 1:
            return [0.0] * 10 + [math.inf] * 10
        return [0.1 if spec.optimizer.label == "sgd" else 7.0] * 20

    scripted(losses)
    config = replace(NOTHING_LEARNED, output=tmp_path)
    summary = Evaluation(config).execute()
    cell = summary["tasks"]["quadratic"]["horizons"]["20"]
    assert cell["best_baseline"] == "adam"
    row = cell["optimizers"]["sgd"]
    assert row["diverged"] == 1
    assert row["sum"]["mean"] is None
    assert row["ratio"]["mean"] is None
    assert row["steps_to_best"] == 1  # both get there before one of them diverges
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "NaN" not in (tmp_path / "runs.jsonl").read_text()
    assert "| 1 diverged (lr 1e-05‡) | **140.0 ± 0.0 (lr 1e-05‡)** |" in markdown(summary)
    # With nobody alive there is nothing to compare with, and still a table and a plot.
    scripted(lambda spec: [math.inf] * 20)
    summary = Evaluation(replace(config, output=tmp_path / "all")).execute()
    assert summary["tasks"]["quadratic"]["horizons"]["20"]["best_baseline"] is None
    assert len(write_report(summary, tmp_path / "all")) == 2


def test_next_best_lr_where_the_best_diverges_on_a_test_seed(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    """0.3 is best and 0.1 second, both diverge on a test seed; 0.1 only after step 10."""

    def losses(spec: RunSpec) -> list[float]:
        value = {0.3: 1.0, 0.1: 2.0, 0.03: 3.0}.get(spec.lr, 9.0)
        good = {0.3: 5, 0.1: 15}.get(spec.lr, 20) if (spec.phase, spec.seed) == ("test", 1) else 20
        return [value] * good + [math.inf] * (20 - good)

    asked = scripted(losses)
    config = replace(
        NOTHING_LEARNED, baselines=("sgd",), horizons=(10, 20), seeds=2, output=tmp_path
    )
    summary = Evaluation(config).execute()
    horizons = summary["tasks"]["quadratic"]["horizons"]
    row = horizons["20"]["optimizers"]["sgd"]
    assert (row["tuned_lr"], row["lr"], row["diverged"]) == (0.3, 0.03, 0)
    assert row["sum"]["mean"] == 60.0
    assert horizons["20"]["best_baseline"] == "sgd"
    short = horizons["10"]["optimizers"]["sgd"]
    assert (short["tuned_lr"], short["lr"], short["sum"]["mean"]) == (0.3, 0.1, 20.0)
    tested = [spec.lr for spec in asked if spec.phase == "test"]
    assert tested == [0.3, 0.3, 0.1, 0.1, 0.03, 0.03]
    text = markdown(summary)
    assert "**60.0 ± 0.0 (lr 0.03†)**" in text
    assert "† the learning rate that was best on the tuning seeds diverged" in text
    assert "‡" not in text
    # All of it is in the log.
    asked.clear()
    assert Evaluation(config).execute() == summary
    assert asked == []


# ---- the log of runs


def test_second_evaluation_performs_no_run(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    config = replace(NOTHING_LEARNED, output=tmp_path)
    first = Evaluation(config).execute()
    asked = scripted(lambda spec: pytest.fail("a run that is in the log"))
    assert Evaluation(config).execute() == first
    assert asked == []
    with pytest.raises(pytest.fail.Exception):  # more seeds are new runs
        Evaluation(replace(config, seeds=3)).execute()


def test_a_line_cut_short_is_done_again(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    config = replace(NOTHING_LEARNED, output=tmp_path)
    first = Evaluation(config).execute()
    log = tmp_path / "runs.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-25])
    real_losses = {entry["key"]: entry["losses"] for entry in map(json.loads, whole.splitlines())}
    asked = scripted(lambda spec: real_losses[spec.key])
    summary = Evaluation(config).execute()
    assert [spec.key for spec in asked] == [json.loads(whole.splitlines()[-1])["key"]]
    assert (
        without_times(summary)["tasks"]["quadratic"]["horizons"]["20"]["optimizers"]["adam"]["sum"]
        == first["tasks"]["quadratic"]["horizons"]["20"]["optimizers"]["adam"]["sum"]
    )
    # The run done again stands on a line of its own: a third evaluation has nothing to do.
    asked.clear()
    Evaluation(config).execute()
    assert asked == []


def test_retrained_checkpoint_is_run_again(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path
) -> None:
    path = tmp_path / "rule.safetensors"
    rule = random_rule("lstm")
    save_rule(rule, path)
    asked = scripted(lambda spec: [1.0] * 20)
    config = replace(NOTHING_LEARNED, checkpoints=(str(path),), output=tmp_path / "out")
    Evaluation(config).execute()
    before = len(asked)
    with torch.no_grad():
        rule.readout.bias.add_(1e-3)
    save_rule(rule, path)
    Evaluation(config).execute()
    assert [(s.optimizer.kind, s.phase, s.seed) for s in asked[before:]] == [
        ("learned", "test", 0),
        ("learned", "test", 1),
    ]
    (tmp_path / "out" / "protocol.json").unlink()  # as in folders of earlier releases
    # The same weights in another place are known again.
    before = len(asked)
    moved = path.rename(tmp_path / "moved.safetensors")
    summary = Evaluation(replace(config, checkpoints=(str(moved),))).execute()
    assert len(asked) == before
    assert summary["protocol"]["checkpoints"] == {"moved": rule.fingerprint()}


def test_checkpoint_replaced_during_its_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)
    config = replace(NOTHING_LEARNED, checkpoints=(str(path),), baselines=(), output=tmp_path)
    evaluation = Evaluation(config)
    save_rule(AdamRule(), path)
    with pytest.raises(ValueError, match=r"rule\.safetensors was replaced while it was evaluated"):
        evaluation.execute()
    assert not (tmp_path / "runs.jsonl").exists()


def test_folder_made_under_other_conditions_is_refused(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(lambda spec: [1.0] * 20)
    module = tmp_path / "own_tasks_a.py"
    module.write_text("from learned_optim.meta.tasks.quadratic import FAMILIES\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("abcdefgh " * 100)
    texts[1].write_text("hgfedcba " * 100 + "?")
    output = tmp_path / "out"
    config = replace(NOTHING_LEARNED, output=output)
    Evaluation(config).execute()
    kept = json.loads((output / "protocol.json").read_text())
    assert sorted(kept) == ["learned_optim", "torch"]
    # More tasks in the same folder: what they depend on comes with them.
    tasks = ("char-lm-gru", "own_tasks_a:quadratic")
    more = replace(config, tasks=tasks, data=DataOptions(text=texts[0]))
    Evaluation(more).execute()
    kept = json.loads((output / "protocol.json").read_text())
    assert sorted(kept) == ["learned_optim", "source of own_tasks_a", "text", "torch"]
    asked.clear()
    with pytest.raises(ValueError, match=r"out were made under .* \(text: \w+ then, \w+ now\)"):
        Evaluation(replace(more, data=DataOptions(text=texts[1])))
    module.write_text(module.read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"\(source of own_tasks_a: .* give another --output"):
        Evaluation(more)
    # What does not depend on them goes on.
    Evaluation(replace(config, data=DataOptions(text=texts[1]))).execute()
    monkeypatch.setattr(torch, "__version__", "1.0.0+cpu")
    with pytest.raises(ValueError, match=r"\(torch: .* then, 1\.0\.0 now\)"):
        Evaluation(config)
    assert asked == []


@pytest.mark.slow
def test_two_workers_give_the_same_figures(adam_checkpoint: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        checkpoints=(str(adam_checkpoint),), tasks=("digits",), baselines=("sgd",), horizons=(10,),
        seeds=2, tuning_seeds=1, output=tmp_path / "one",
    )  # fmt: skip
    one = Evaluation(config).execute()
    reports: list[tuple[int, int, str]] = []
    two = Evaluation(
        replace(config, workers=2, output=tmp_path / "two"), lambda *report: reports.append(report)
    ).execute()
    assert without_times(two) == without_times(one)
    assert reports[0] == (0, len(LR_GRID), "tuning")
    assert reports[-1] == (4, 4, "testing")


# ---- labels and errors


def test_labels(tmp_path: Path) -> None:
    """A stem where it is unambiguous, else the path as given."""
    for name in ("a/best", "b/best", "c/rule", "d/adam"):
        (tmp_path / name).parent.mkdir()
        save_rule(random_rule("lstm"), tmp_path / f"{name}.safetensors")
    save_rule(random_rule("lstm"), tmp_path / "folder" / "model.safetensors")
    given = [str(tmp_path / f"{name}.safetensors") for name in ("a/best", "b/best", "c/rule")]
    given += [str(tmp_path / "d" / "adam.safetensors"), str(tmp_path / "folder")]
    found = runs.optimizer_specs(given, ["sgd", "adam"])
    assert [c.label for c in found] == [
        given[0],
        given[1],
        "rule",
        given[3],
        "folder",
        "sgd",
        "adam",
    ]
    assert [c.kind for c in found] == ["learned"] * 5 + ["baseline"] * 2
    assert len({c.identity for c in found}) == 3  # five files of one rule, and two baselines


def test_errors_come_before_any_run(
    scripted: Callable[[Losses], list[RunSpec]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = scripted(lambda spec: pytest.fail("a run before the error"))
    config = replace(NOTHING_LEARNED, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"unknown task 'nonesuch'; known: .*quadratic"):
        Evaluation(replace(config, tasks=("quadratic", "nonesuch"))).execute()
    with pytest.raises(ValueError, match=r"unknown baseline 'adan'; known: adam, .*sgd"):
        Evaluation(replace(config, baselines=("sgd", "adan"))).execute()
    with pytest.raises(ValueError, match=r"unknown checkpoint 'nonesuch'; known: "):
        Evaluation(replace(config, checkpoints=("nonesuch",))).execute()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*gone\.safetensors"):
        Evaluation(replace(config, checkpoints=(str(tmp_path / "gone.safetensors"),))).execute()
    options = DataOptions(tmp_path / "empty", download=False)
    with pytest.raises(
        FileNotFoundError, match=r"no mnist images under .*empty and downloading is"
    ):
        Evaluation(replace(config, tasks=("quadratic", "mnist"), data=options)).execute()
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ImportError, match="install the extra 'baselines'"):
        Evaluation(replace(config, baselines=("schedulefree",))).execute()
    assert asked == []
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"baselines": ()}, "at least one task, one horizon and one optimizer"),
        ({"horizons": (5,)}, "horizons must be at least 10, got"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"tuning_seeds": 0}, "tuning_seeds at least 1"),
        ({"tasks": ("digits", "digits")}, "tasks names something twice: digits, digits"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NOTHING_LEARNED, **changes)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_descends(name: str) -> None:
    """Half a square from 1: a smaller loss after 50 steps, and first steps by hand."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = make_baseline(name, [param], max(0.1, BASELINES[name].lr or 0.0), 50)
    for step in range(50):
        optimizer.zero_grad()
        (0.5 * param.square().sum()).backward()
        optimizer.step()
        if step == 0 and name in ("sgd", "nesterov", "adam"):
            # SGD moves by lr, Nesterov by lr * (1 + 0.9), Adam's first step is lr whatever g is.
            moved = {"sgd": 0.1, "nesterov": 0.19, "adam": 0.1}[name]
            assert param[0].item() == pytest.approx(1.0 - moved, abs=1e-6)
    assert param.abs().max() < 0.9


# ---- reports


def test_report_files(scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path) -> None:
    factor = {"rule": 1.0, "sgd": 2.0, "adam": 4.0}
    scripted(
        lambda spec: [
            factor[spec.optimizer.label] * (2.0 * 0.9**t + 0.01 * spec.seed) for t in range(20)
        ]
    )
    path = tmp_path / "rule.safetensors"
    save_rule(random_rule("lstm"), path)
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(path),), tasks=("quadratic", "digits"),
        horizons=(10, 20), output=tmp_path / "out",
    )  # fmt: skip
    written = write_report(Evaluation(config).execute(), config.output)
    assert [p.name for p in written] == [
        "table.md", "quadratic-10.png", "quadratic-20.png", "digits-10.png", "digits-20.png",
    ]  # fmt: skip
    for image_path in written[1:]:
        with Image.open(image_path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width >= 800
            colours = image.convert("RGB").getcolors(1 << 20)
            # All three curves are there, in their own colours.
            drawn = {colour for count, colour in colours or [] if count > 20}
            assert {(0, 114, 178), (230, 159, 0), (0, 158, 115)} <= drawn
    lines = written[0].read_text().splitlines()
    overview = lines.index("## Summed loss over 20 steps")
    assert lines[overview + 2] == "| task | rule | rule / best baseline | sgd | adam |"
    # Two seeds 0.2 apart in the sum: 20 (1 - 0.9^20) + 0.1 = 17.7, half of it 12.7062 * 0.1.
    assert lines[overview + 4] == (
        "| quadratic | 17.7 ± 1.3 | **0.50 [0.50, 0.50]** | **35.3 ± 2.5 (lr 1e-05‡)** "
        "| 70.7 ± 5.1 (lr 1e-05‡) |"
    )


def test_tasks_of_two_modules_have_their_own_plots(
    scripted: Callable[[Losses], list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(lambda spec: [2.0 - 0.01 * t for t in range(20)])
    for name in ("own_tasks_b", "own_tasks_c"):
        line = "from learned_optim.meta.tasks.quadratic import FAMILIES\n"
        (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = ("own_tasks_b:quadratic", "own_tasks_c:quadratic")
    summary = Evaluation(replace(NOTHING_LEARNED, tasks=tasks, output=tmp_path)).execute()
    assert [path.name for path in write_report(summary, tmp_path)] == [
        "table.md", "own_tasks_b.quadratic-20.png", "own_tasks_c.quadratic-20.png",
    ]  # fmt: skip
    assert plot_curves(summary, tmp_path) == [
        "own_tasks_b.quadratic-20.png", "own_tasks_c.quadratic-20.png",
    ]  # fmt: skip


def test_axis_has_plain_numbers() -> None:
    from matplotlib.figure import Figure

    from learned_optim.summary import _set_log_axis

    figure = Figure()
    axes = figure.add_subplot()
    row = {"curve": {"step": [0, 1], "mean": [2.3, 0.05], "half": [0.0, 0.0]}}
    axes.plot([0, 1], [2.3, 0.05])
    _set_log_axis(axes, {"adam": row})
    low, high = axes.get_ylim()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shown = [x for x in axes.get_yticks() if low <= x <= high]
    assert shown == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    assert {"0.1", "0.5", "1", "2"} <= set(labels)
    assert not any(axes.get_yminorticklabels()[i].get_text() for i in range(3))


def test_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# ---- the fast tier: real training, pinned figures


@pytest.mark.parametrize(
    ("task", "checkpoints", "best", "pinned"),
    [
        (
            "quadratic",
            ("quadratic",),
            "nesterov",
            {
                "quadratic": (1.0, 31.97),
                "nesterov": (0.01, 41.65),
                "rmsprop": (0.03, 59.41),
                "adam": (0.3, 73.15),
            },
        ),
        (
            "digits",
            (),
            "rmsprop",
            {"nesterov": (1.0, 98.64), "rmsprop": (0.03, 70.28), "adam": (0.03, 87.33)},
        ),
    ],
)
def test_fast_tier(
    task: str,
    checkpoints: tuple[str, ...],
    best: str,
    pinned: dict[str, tuple[float, float]],
    tmp_path: Path,
) -> None:
    config = EvaluateConfig(
        checkpoints=checkpoints, tasks=(task,), baselines=("nesterov", "rmsprop", "adam"),
        horizons=(50,), seeds=2, tuning_seeds=1, output=tmp_path,
    )  # fmt: skip
    cell = Evaluation(config).execute()["tasks"][task]["horizons"]["50"]
    assert cell["best_baseline"] == best
    for name, (lr, summed) in pinned.items():
        row = cell["optimizers"][name]
        assert row["lr"] == lr
        assert row["sum"]["mean"] == pytest.approx(summed, rel=0.02)


def against_adam(
    checkpoint: str, task: str, lrs: tuple[float, ...], output: Path, data: DataOptions, seeds: int
) -> float:
    """Summed loss over 100 steps of a checkpoint, relative to that of Adam tuned over ``lrs``."""
    config = EvaluateConfig(
        checkpoints=(checkpoint,), tasks=(task,), baselines=("adam",), horizons=(100,),
        seeds=seeds, tuning_seeds=3, output=output, data=data,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "LR_GRID", lrs)
        optimizers = Evaluation(config).execute()["tasks"][task]["horizons"]["100"]["optimizers"]
    assert optimizers["adam"]["lr"] not in (lrs[0], lrs[-1])  # the best lies inside
    return optimizers[checkpoint]["ratio"]["mean"]


def test_shipped_quadratic_rule_beats_tuned_adam(tmp_path: Path) -> None:
    lrs = (0.03, 0.1, 0.3, 1.0)
    assert against_adam("quadratic", "quadratic", lrs, tmp_path, DataOptions(), 10) < 0.6


def test_shipped_mnist_rule_beats_tuned_adam(image_data: DataOptions, tmp_path: Path) -> None:
    """On the half of MNIST that did not meta-train it."""
    assert against_adam("mnist", "mnist", (0.01, 0.03, 0.1), tmp_path, image_data, 3) < 0.75


def test_shipped_mnist_rule_beats_tuned_adam_on_digits(tmp_path: Path) -> None:
    lrs = (0.01, 0.03, 0.1)
    assert against_adam("mnist", "digits", lrs, tmp_path, DataOptions(), 3) < 0.7


def test_refresh_gives_what_evaluating_anew_does(adam_checkpoint: Path, tmp_path: Path) -> None:
    """A new checkpoint in an old summary, with no run of the old evaluation at hand."""
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(adam_checkpoint),), tasks=("quadratic", "digits"),
        horizons=(10, 20), output=tmp_path / "old",
    )  # fmt: skip
    old = json.loads(json.dumps(Evaluation(config).execute()))
    save_rule(AdamRule(AdamConfig(lr=0.03)), adam_checkpoint)
    refreshed = Evaluation(replace(config, output=tmp_path / "new")).refresh(old)
    anew = Evaluation(replace(config, output=tmp_path / "anew")).execute()
    assert without_times(refreshed) == without_times(anew)
    assert without_times(refreshed) != without_times(old)
    assert "|tune|" not in (tmp_path / "new" / "runs.jsonl").read_text()


def test_refresh_refuses_another_protocol_and_other_losses(
    adam_checkpoint: Path, tmp_path: Path
) -> None:
    config = replace(NOTHING_LEARNED, checkpoints=(str(adam_checkpoint),), output=tmp_path / "old")
    old = Evaluation(config).execute()
    more = Evaluation(replace(config, seeds=3, output=tmp_path / "new"))
    with pytest.raises(ValueError, match="the summary has seeds=2 and this evaluation 3"):
        more.refresh(old)
    cell = old["tasks"]["quadratic"]["horizons"]["20"]
    best = cell["optimizers"][cell["best_baseline"]]["sum"]
    best["mean"] += 0.8 * best["half"]  # as far as another processor's rounding may lead
    assert Evaluation(config).refresh(old)
    best["mean"] += 0.8 * best["half"]
    with pytest.raises(ValueError, match="in the summary: evaluate anew"):
        Evaluation(config).refresh(old)


def test_an_optimizer_that_anneals_runs_to_each_horizon(tmp_path: Path, scripted) -> None:
    """A part of a longer run would be one whose end it never saw."""
    path = tmp_path / "annealing.safetensors"
    save_rule(random_rule("horizon"), path)
    asked = scripted(lambda spec: [1.0 + 1.0 / spec.steps] * spec.steps)
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(path),), horizons=(10, 20), output=tmp_path / "out"
    )
    summary = Evaluation(config).execute()
    learned = {(spec.steps, spec.seed) for spec in asked if spec.optimizer.kind == "learned"}
    assert learned == {(steps, seed) for steps in (10, 20) for seed in (0, 1)}
    assert {spec.steps for spec in asked if spec.optimizer.kind == "baseline"} == {20}
    for horizon, expected in ((10, 11.0), (20, 21.0)):
        row = summary["tasks"]["quadratic"]["horizons"][str(horizon)]["optimizers"]["annealing"]
        assert row["sum"]["mean"] == pytest.approx(expected)


OWN_RULE = """
from dataclasses import dataclass
from learned_optim.rules import RuleConfig, UpdateRule

@dataclass(frozen=True)
class OwnConfig(RuleConfig):
    lr: float = 0.01

class OwnRule(UpdateRule):
    name = "own-of-the-evaluation"
    Config = OwnConfig

    def forward(self, grad, state, param, segments, context):
        return -self.config.lr * grad, {}
"""


def test_workers_know_rules_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of its own: a script is run again."""
    rule_names()
    monkeypatch.setattr(_config, "RULES", dict(_config.RULES))
    (tmp_path / "own_rule_of_the_evaluation.py").write_text(OWN_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_rule_of_the_evaluation")
    save_rule(own.OwnRule(), tmp_path / "own.safetensors")
    evaluate = [
        *("-m", "learned_optim", "--rules", "own_rule_of_the_evaluation", "evaluate"),
        *("--checkpoints", "own.safetensors", "--tasks", "quadratic", "--baselines", "sgd"),
        *("--horizons", "10", "--seeds", "2", "--tuning-seeds", "1", "--workers", "2"),
    ]
    found = subprocess.run(
        [sys.executable, *evaluate], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "| quadratic | own | 1 |" in found.stdout


def test_what_is_printed_fits_a_terminal(tmp_path: Path, scripted, adam_checkpoint: Path) -> None:
    scripted(lambda spec: [1.0] * spec.steps)
    config = replace(NOTHING_LEARNED, checkpoints=(str(adam_checkpoint),), output=tmp_path / "out")
    text = brief(Evaluation(config).execute())
    assert "| quadratic | handmade | 1 | 20.0" in text
    assert "(best)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_plot_of_nothing_finite_says_so(tmp_path: Path, scripted) -> None:
    scripted(lambda spec: [math.nan] * spec.steps)
    summary = Evaluation(replace(NOTHING_LEARNED, output=tmp_path / "out")).execute()
    plot(summary, "quadratic", 20, tmp_path / "plot.svg")
    assert "no loss was finite" in (tmp_path / "plot.svg").read_text()
