"""The evaluation protocol: pairing, tuning, resuming, figures by hand, and the report."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OWN_RULE, random_rule

from learned_optim import LearnedOptimizer, load_rule, save_rule
from learned_optim.evaluation import (
    BASELINES,
    EvaluateConfig,
    Evaluation,
    brief,
    markdown,
    runs,
    write_report,
)
from learned_optim.evaluation.baselines import LR_GRID, MATRIX_LRS
from learned_optim.evaluation.figures import Figures, final_loss, ratio, summarize
from learned_optim.evaluation.protocol import FIELD_LRS
from learned_optim.evaluation.runs import OptimizerSpec, Run, RunSpec
from learned_optim.evaluation.statistics import (
    best_of,
    curve,
    geometric_mean,
    interval,
    pooled,
    ratio_interval,
)
from learned_optim.meta import DataOptions
from learned_optim.meta.tasks import Batch, Params, Task, field_steps, field_tasks
from learned_optim.rules._base import RULES
from learned_optim.rules.classical import AdamConfig, AdamRule

NOTHING_LEARNED = EvaluateConfig(
    checkpoints=(), tasks=("quadratic",), baselines=("sgd", "adam"), steps=20, seeds=2,
    tuning_seeds=1,
)  # fmt: skip
FIELD = EvaluateConfig(
    suite="field", checkpoints=(), tasks=("regression", "matrix-factorization"), quick=True,
    seeds=2, baselines=("adamw-cosine", "adam-1e-3"),
)  # fmt: skip

Losses = Callable[[RunSpec], list[float]]
Script = Callable[[Losses], list[RunSpec]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Replaces training by given losses; the list returned fills with the runs asked for."""

    def install(losses: Losses) -> list[RunSpec]:
        asked: list[RunSpec] = []

        def run(spec: RunSpec, data: DataOptions, families: Any) -> Run:
            asked.append(spec)
            values = losses(spec)
            good = all(map(math.isfinite, values))
            test = {"loss": 1.0, "accuracy": 0.75} if good else {}
            return Run(values, 0.5 if good else math.inf, test, 0.25)

        monkeypatch.setattr(runs, "run", run)
        return asked

    return install


def without_times(summary: Any) -> Any:
    """A summary less what a clock measured."""
    if isinstance(summary, dict):
        clock = ("milliseconds", "seconds", "second_share")
        return {k: without_times(v) for k, v in summary.items() if not any(c in k for c in clock)}
    return summary


# ---- statistics by hand


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


def test_geometric_mean_by_hand() -> None:
    # Resampling two values gives both ends with a chance of a quarter each.
    assert geometric_mean([0.5, 2.0]) == {
        "mean": pytest.approx(1.0), "low": pytest.approx(0.5), "high": pytest.approx(2.0),
    }  # fmt: skip
    assert geometric_mean([3.0]) == {"mean": pytest.approx(3.0), "low": None, "high": None}
    assert geometric_mean([]) == {"mean": None, "low": None, "high": None}


def test_small_statistics_by_hand() -> None:
    assert pooled([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert pooled([1.0, math.inf], 1) == [math.inf]
    # Two values 2 apart: t at 1 degree of freedom is 12.7062, and so is half the interval.
    drawn = curve(torch.tensor([[1.0, 3.0], [3.0, 5.0]]).double(), 20)
    assert drawn == {"step": [5.0, 15.0], "mean": [2.0, 4.0], "half": [12.71, 12.71]}
    # Pairs of 1, 2, 4 have the minima 1, 1 and 2.
    assert [best_of([4.0, 1.0, 2.0], k) for k in (1, 2, 3)] == pytest.approx([7 / 3, 4 / 3, 1.0])
    one = torch.ones(2)  # ratios are cut off, and divergence counts
    assert [ratio(3 * one, 2 * one), ratio(one, 100 * one)] == [1.5, 0.1]
    assert [ratio(torch.tensor([1.0, math.inf]), one), ratio(one, math.inf * one)] == [10.0, 0.1]


def figures(label: str, losses: list[float], seconds: float = 1.0) -> Figures:
    """One seed's figures over 100 steps."""
    done = Run(losses, seconds if math.isfinite(losses[-1]) else math.inf, {}, 0.5)
    return Figures.of(OptimizerSpec(label, "baseline", label, label), 0.1, 100, [done])


def test_summary_by_hand() -> None:
    """A rival falls at step 50, another at 25; one hardly falls, one diverges."""
    everybody = {
        "rival": figures("rival", [2.0] * 10 + [1.0] * 10),
        "fast": figures("fast", [2.0] * 5 + [0.5] * 15, seconds=4.0),
        "stuck": figures("stuck", [2.0] * 19 + [1.95]),
        "gone": figures("gone", [2.0] * 10 + [math.inf] * 10),
    }
    found = summarize({"t": everybody}, ["rival"], ["fast", "stuck", "gone"])
    rows = found["tasks"]["t"]["optimizers"]
    assert found["tasks"]["t"]["best_tuned"] == "rival"
    # The last 5 % of twenty stretches are one; its mean is the final loss.
    assert final_loss(Run([3.0] * 19 + [1.0], 1.0, {})) == 1.0
    assert rows["fast"]["ratio"]["mean"] == 0.5
    assert rows["fast"]["sum"]["mean"] == pytest.approx(100 * (5 * 2.0 + 15 * 0.5) / 20)
    assert (rows["stuck"]["diverged"], rows["gone"]["diverged"]) == (0, 1)
    overall = found["overall"]
    assert overall["gone"]["ratio"]["mean"] == pytest.approx(10.0)
    assert overall["gone"]["diverged"] == 1.0
    assert found["untuned_pairs"]["stuck"]["fast"]["mean"] == pytest.approx(3.9)
    json.dumps(found, allow_nan=False)


# ---- the protocol


class Recording(Task):
    """Least squares that keeps what it gave: an initialization and batches, run by run."""

    def __init__(self) -> None:
        self.given: list[list[torch.Tensor]] = []

    def init(self, generator: torch.Generator) -> Params:
        self.given.append([torch.randn(3, generator=generator)])
        return {"x": self.given[-1][0].clone()}

    def batch(self, generator: torch.Generator) -> Batch:
        self.given[-1].append(torch.randn(4, 3, generator=generator))
        return (self.given[-1][-1],)

    def loss(self, params: Params, batch: Batch) -> torch.Tensor:
        return (batch[0] @ params["x"]).square().mean()


def test_everybody_sees_the_same(rule_file: Path) -> None:
    """Initial parameters and batches depend on phase and seed, never on the optimizer or lr."""
    task = Recording()
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(rule_file),), tasks=("mine",), steps=10, lrs=(0.03, 0.1),
        tuning_seeds=2, output=rule_file.parent,
    )  # fmt: skip
    evaluation = Evaluation(config, tasks={"mine": task})
    task.given.clear()
    evaluation.execute()
    groups: dict[tuple[float, ...], list[list[torch.Tensor]]] = {}
    for given in task.given:
        groups.setdefault(tuple(given[0].tolist()), []).append(given)
    # Two rivals at two rates on each tuning seed; the rule and the rivals on each test seed.
    assert sorted(map(len, groups.values())) == [3, 3, 4, 4]
    for runs_of_seed in groups.values():
        batches = [torch.stack(given[1:]) for given in runs_of_seed]
        assert batches[0].shape == (10, 4, 3)
        assert all(torch.equal(found, batches[0]) for found in batches)
    assert len({found[0][1].sum().item() for found in groups.values()}) == 4


@pytest.mark.parametrize(
    ("name", "told", "length"),
    [("quadratic", True, None), ("default", True, 700), ("default", False, None)],
)
def test_a_learned_optimizer_runs_as_its_users_run_it(
    name: str, told: bool, length: int | None
) -> None:
    """With the defaults of the class, its warm-up included; told the steps if its rule asks."""
    (spec,) = runs.optimizer_specs([name], [], told)
    assert spec.identity.endswith("without total_steps") != told
    made, users = (
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        for optimizer in (
            spec.make([torch.zeros(1)], 1.0, 700),
            LearnedOptimizer([torch.zeros(1)], name, total_steps=length),
        )
    )
    assert made == users


def test_the_same_optimizer_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Adam under two names, and as an update rule run like a learned one."""
    monkeypatch.setitem(BASELINES, "adam-again", BASELINES["adam"])
    path = tmp_path / "handmade.safetensors"
    save_rule(AdamRule(AdamConfig(lr=0.1)), path)
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(path),), baselines=("adam", "adam-again"),
        lrs=(0.01, 0.1), output=tmp_path,
    )  # fmt: skip
    rows = without_times(Evaluation(config).execute()["tasks"]["quadratic"]["optimizers"])
    assert rows["adam"] == rows["adam-again"]
    assert rows["adam"]["lr"] == 0.1
    assert rows["handmade"]["sum"]["mean"] == pytest.approx(rows["adam"]["sum"]["mean"], rel=1e-4)
    assert rows["handmade"]["ratio"]["mean"] == pytest.approx(1.0, rel=1e-4)


def test_tuned_lr_is_the_argmin(scripted: Script, tmp_path: Path) -> None:
    """By the sum 0.3 is best on average (not on every seed)."""

    def losses(spec: RunSpec) -> list[float]:
        if spec.lr == 0.3:
            return [1.0 if spec.seed else 2.0] * 20
        return [0.1] * 19 + [math.inf] if spec.lr == 10.0 else [1.8] * 20

    asked = scripted(losses)
    config = replace(NOTHING_LEARNED, baselines=("sgd",), tuning_seeds=2, output=tmp_path)
    assert Evaluation(config).execute()["tasks"]["quadratic"]["optimizers"]["sgd"]["lr"] == 0.3
    tuning = [spec for spec in asked if spec.phase == "tune"]
    assert sorted({spec.lr for spec in tuning}) == list(LR_GRID)
    assert len(tuning) == 2 * len(LR_GRID)
    assert {(s.lr, s.seed) for s in asked if s.phase == "test"} == {(0.3, 0), (0.3, 1)}


def test_protocol_of_the_field(scripted: Script, tmp_path: Path) -> None:
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
    config = replace(FIELD, output=tmp_path / "out")
    summary = Evaluation(config, lambda *report: seen.append(report)).execute()
    tasks = summary["tasks"]
    assert tasks["matrix-factorization"]["optimizers"]["adamw-cosine"]["lr"] == 0.01
    assert tasks["regression"]["optimizers"]["adamw-cosine"]["lr"] == 0.003
    assert tasks["regression"]["optimizers"]["adam-1e-3"]["ratio"]["mean"] == 1 / 0.8
    assert {s.steps for s in asked if s.task == "regression"} == {
        field_steps("regression", quick=True)
    }
    tuning = [s for s in asked if s.phase == "tune"]
    assert sorted({s.lr for s in tuning}) == sorted(FIELD_LRS)
    assert len(tuning) == 2 * len(FIELD_LRS)
    # Every task is tried before any is tried again, and progress is told.
    assert [s.task for s in asked[:2]] == list(FIELD.tasks)
    assert seen[0] == (0, 2, "checking regression")
    assert seen[-1][0] == seen[-1][1]
    # Everything is in the log.
    asked.clear()
    assert Evaluation(config).execute() == summary
    assert asked == []
    text = markdown(summary)
    assert "## Untuned against tuned" in text
    assert "| regression, 500 steps | adamw-cosine | 0.003 |" in text
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_long_runs_are_kept_short() -> None:
    (adam,) = runs.optimizer_specs([], ["adam-1e-3"])
    short = runs.run(RunSpec("regression", adam, 1e-3, "test", 0, 300), DataOptions())
    assert len(short.losses) == 100
    assert 0.0 < short.optimizer_seconds < short.seconds


def test_usual_values_of_the_suites() -> None:
    whole, quick = (EvaluateConfig(suite="field", quick=quick).filled() for quick in (False, True))
    assert whole.tasks == quick.tasks == tuple(field_tasks())
    assert (whole.seeds, quick.seeds) == (3, 2)
    assert set(quick.baselines) < set(whole.baselines)
    short = EvaluateConfig().filled()
    assert (short.tasks, short.steps, short.tune_by) == (("quadratic", "digits"), 100, "sum")


# ---- divergence and what is missing


def test_diverged_runs_are_infinite() -> None:
    optimizer = runs.optimizer_specs([], ["sgd"])[0]
    run = runs.run(RunSpec("quadratic", optimizer, 10.0, "test", 0, 100), DataOptions())
    first = run.losses.index(math.inf)
    assert 0 < first < 100
    assert run.losses[first:] == [math.inf] * (100 - first)
    assert run.seconds == math.inf
    assert run.test == {}


def test_matrix_methods_have_rates_of_their_own(scripted: Script, tmp_path: Path) -> None:
    """On the field Muon has three of the seven rates; rates of the user's own are kept."""
    asked = scripted(lambda spec: [0.1] * 100)
    config = replace(FIELD, tasks=("regression",), baselines=("muon-cosine",))
    for lrs, tried in (((), MATRIX_LRS), ((0.2, 0.3), (0.2, 0.3))):
        asked.clear()
        Evaluation(replace(config, lrs=lrs, output=tmp_path / str(len(lrs)))).execute()
        assert sorted({s.lr for s in asked if s.phase == "tune"}) == list(tried)


def test_diverging_runs_count(scripted: Script, tmp_path: Path) -> None:
    scripted(lambda spec: [1.0] * 50 + [math.inf if spec.lr == 1e-3 else 1.0] * 50)
    config = replace(FIELD, output=tmp_path)
    summary = Evaluation(config).execute()
    assert summary["overall"]["adam-1e-3"]["diverged"] == 1.0
    assert summary["overall"]["adam-1e-3"]["ratio"]["mean"] == pytest.approx(10.0)
    assert "| 2 diverged |" in markdown(summary)
    assert "NaN" not in (tmp_path / "runs.jsonl").read_text()
    # Nobody alive: still a summary, tables and plots that say so.
    scripted(lambda spec: [math.inf] * 100)
    everything = Evaluation(replace(config, output=tmp_path / "all")).execute()
    assert everything["tasks"]["regression"]["best_tuned"] is None
    assert len(write_report(everything, tmp_path / "all")) == 3


def test_rival_without_its_package_and_task_without_its_data(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are named and counted, and the rest goes on."""
    scripted(lambda spec: [1.0] * 100)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    config = replace(
        FIELD, baselines=("adam-1e-3", "prodigy"), tasks=("regression", "char-lm-gru"),
        data=DataOptions(text=tmp_path / "none.txt"), output=tmp_path,
    )  # fmt: skip
    summary = Evaluation(config).execute()
    assert list(summary["protocol"]["skipped"]) == ["prodigy", "char-lm-gru"]
    assert list(summary["tasks"]) == ["regression"]
    for text in (markdown(summary), brief(summary)):
        assert "2 left out." in text
        assert "Without prodigy: the baseline 'prodigy' needs its package: install" in text
        assert "Without char-lm-gru: no text file at" in text
    assert "No tuned rival took part." in markdown(summary)
    with pytest.raises(ValueError, match="at least one optimizer whose package is installed"):
        Evaluation(replace(config, baselines=("prodigy",)))
    with pytest.raises(FileNotFoundError, match=r"no text file at .*none\.txt: --text names"):
        Evaluation(replace(config, tasks=("char-lm-gru",)))


# ---- the log of runs


def test_a_line_cut_short_is_done_again(scripted: Script, tmp_path: Path) -> None:
    config = replace(NOTHING_LEARNED, output=tmp_path)
    asked = scripted(lambda spec: [1.0] * 20)
    first = Evaluation(config).execute()
    log = tmp_path / "runs.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-25])
    asked.clear()
    assert Evaluation(config).execute() == first
    assert [spec.key for spec in asked] == [json.loads(whole.splitlines()[-1])["key"]]
    # The run done again stands on a line of its own: a third evaluation has nothing to do.
    asked.clear()
    Evaluation(config).execute()
    assert asked == []


def test_retrained_checkpoint_is_run_again(
    scripted: Script, rule_file: Path, tmp_path: Path
) -> None:
    rule = load_rule(rule_file)
    asked = scripted(lambda spec: [1.0] * 20)
    config = replace(NOTHING_LEARNED, checkpoints=(str(rule_file),), output=tmp_path / "out")
    Evaluation(config).execute()
    before = len(asked)
    with torch.no_grad():
        next(rule.parameters()).add_(1e-3)
    save_rule(rule, rule_file)
    Evaluation(config).execute()
    learned = [(s.optimizer.kind, s.phase, s.seed) for s in asked[before:]]
    assert learned == [("learned", "test", 0), ("learned", "test", 1)]
    # The same weights in another place are known again.
    before = len(asked)
    moved = rule_file.rename(tmp_path / "moved.safetensors")
    summary = Evaluation(replace(config, checkpoints=(str(moved),))).execute()
    assert len(asked) == before
    assert summary["protocol"]["checkpoints"] == {"moved": rule.fingerprint()}


def test_checkpoint_replaced_during_its_evaluation(rule_file: Path) -> None:
    config = replace(NOTHING_LEARNED, checkpoints=(str(rule_file),), output=rule_file.parent)
    evaluation = Evaluation(config)
    save_rule(AdamRule(), rule_file)
    with pytest.raises(ValueError, match=r"rule\.safetensors was replaced while it was evaluated"):
        evaluation.execute()


def test_folder_made_under_other_conditions_is_refused(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(lambda spec: [1.0] * 20)
    module = tmp_path / "own_tasks_a.py"
    module.write_text("from learned_optim.meta.tasks.quadratic import FAMILIES\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("abcdefgh " * 100)
    texts[1].write_text("hgfedcba " * 100 + "?")
    config = replace(NOTHING_LEARNED, output=tmp_path / "out")
    Evaluation(config).execute()
    # More tasks in the same folder: what they depend on comes with them.
    tasks = ("char-lm-gru", "own_tasks_a:quadratic")
    more = replace(config, tasks=tasks, data=DataOptions(text=texts[0]))
    Evaluation(more).execute()
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
    labels = [given[0], given[1], "rule", given[3], "folder", "sgd", "adam"]
    assert [c.label for c in found] == labels
    assert [c.kind for c in found] == ["learned"] * 5 + ["baseline"] * 2
    assert len({c.identity for c in found}) == 3  # five files of one rule, and two baselines


def test_errors_come_before_any_run(
    scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(lambda spec: pytest.fail("a run before the error"))
    (tmp_path / "own_broken.py").write_text(
        "import torch\n"
        "from learned_optim.meta.tasks import FixedTask, ModuleTask\n"
        "nan = torch.full((4, 1), float('nan'))\n"
        "broken = ModuleTask(lambda: torch.nn.Linear(1, 1), lambda g: (nan, nan), "
        "torch.nn.functional.mse_loss)\n"
        "FAMILIES = {'broken': lambda options: FixedTask(broken)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(NOTHING_LEARNED, output=tmp_path / "out")
    for changes, message in (
        ({"tasks": ("quadratic", "nonesuch")}, r"unknown task 'nonesuch'; known: .*quadratic"),
        ({"baselines": ("sgd", "adan")}, r"unknown baseline 'adan'; known: adam, .*sgd"),
        ({"checkpoints": ("nonesuch",)}, r"unknown checkpoint 'nonesuch'; known: "),
        ({"suite": "field", "steps": 0, "tasks": ("mnist",)}, r"'mnist' is not of the field.* Of"),
        ({"tasks": ("own_broken:broken",)}, r"'own_broken:broken': the loss is nan at the initial"),
        ({"tuning_seeds": -1}, "tuning_seeds must be at least 0, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"tasks": ("digits", "digits")}, "tasks names something twice: digits, digits"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation(replace(config, **changes))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .* at .*gone\.safetensors"):
        Evaluation(replace(config, checkpoints=(str(tmp_path / "gone.safetensors"),)))
    assert asked == []
    assert not config.output.exists()


# ---- reports


def test_report(scripted: Script, rule_file: Path) -> None:
    """Final, held-out and summed loss stand side by side; images have their stated names."""
    factor = {"rule": 1.0, "sgd": 2.0, "adam": 4.0}
    scripted(
        lambda spec: [
            factor[spec.optimizer.label] * (2.0 * 0.9**t + 0.01 * spec.seed) for t in range(20)
        ]
    )
    config = replace(
        NOTHING_LEARNED, checkpoints=(str(rule_file),), tasks=("quadratic", "digits"),
        output=rule_file.parent / "out",
    )  # fmt: skip
    summary = Evaluation(config).execute()
    written = write_report(summary, config.output)
    assert [p.name for p in written] == [
        "table.md", "quadratic.png", "digits.png", "worth.png",
    ]  # fmt: skip
    for image in written[1:]:
        assert image.read_bytes().startswith(b"\x89PNG")
    text = brief(summary)
    assert "- `rule`, untuned: Its final loss is 0.50 times the best tuned rival's" in text
    assert "One run equals the best of more than 13 sgd runs." in text
    # Two seeds 0.2 apart in the sum: 20 (1 - 0.9^20) + 0.1 = 17.7, half of it 12.7062 * 0.1.
    row = next(line for line in text.splitlines() if "| **rule** | 1 |" in line)
    assert row.endswith("| 1.000 ± 0.000, 75.0% | 17.7 ± 1.3 | **0.50 [0.50, 0.50]** |")
    assert "| quadratic, 20 steps | sgd | 1e-05‡ |" in text
    assert max(map(len, text.splitlines()[4:])) <= 120


def test_ahead_and_behind_are_what_intervals_carry(scripted: Script, rule_file: Path) -> None:
    """Against one rival the tasks agree, against another they do not."""

    def losses(spec: RunSpec) -> list[float]:
        mixed = {"regression": 0.5, "matrix-factorization": 3.0}[spec.task]
        value = {"adam-1e-3": 2.0, "prodigy": mixed, "adamw-cosine-1e-3": 0.5}
        return [value.get(spec.optimizer.label, 1.0)] * 100

    scripted(losses)
    config = replace(
        FIELD, checkpoints=(str(rule_file),), output=rule_file.parent,
        baselines=("adam-1e-3", "prodigy", "adamw-cosine-1e-3"),
    )  # fmt: skip
    words = brief(Evaluation(config).execute())
    assert "ahead of adam-1e-3, level with prodigy, behind adamw-cosine-1e-3 in" in words


# ---- real training


# Learning rate and summed loss by task and optimizer; the best tuned one comes last.
PINNED = {
    "quadratic": {"quadratic": (1.0, 31.97), "adam": (0.3, 73.15), "nesterov": (0.01, 41.65)},
    "digits": {"nesterov": (1.0, 98.64), "rmsprop": (0.03, 70.28)},
}


@pytest.mark.parametrize("task", PINNED)
def test_pinned_figures(task: str, tmp_path: Path) -> None:
    config = EvaluateConfig(
        checkpoints=("quadratic",) if task == "quadratic" else (), tasks=(task,),
        baselines=("nesterov", "rmsprop", "adam"), steps=50, seeds=2, tuning_seeds=1,
        output=tmp_path,
    )  # fmt: skip
    found = Evaluation(config).execute()["tasks"][task]
    assert found["best_tuned"] == list(PINNED[task])[-1]
    for name, (lr, summed) in PINNED[task].items():
        row = found["optimizers"][name]
        assert row["lr"] == lr
        assert row["sum"]["mean"] == pytest.approx(summed, rel=0.02)


@pytest.mark.parametrize(
    ("checkpoint", "task", "lrs", "seeds", "limit"),
    [
        ("quadratic", "quadratic", (0.03, 0.1, 0.3, 1.0), 10, 0.6),
        ("mnist", "mnist", (0.01, 0.03, 0.1), 3, 0.75),  # the half that did not meta-train it
        ("mnist", "digits", (0.01, 0.03, 0.1), 3, 0.7),
    ],
)
def test_shipped_rules_beat_tuned_adam(
    checkpoint: str, task: str, lrs: tuple[float, ...], seeds: int, limit: float,
    tmp_path: Path, data_for: Callable[[bool], DataOptions],
) -> None:  # fmt: skip
    """In the loss summed over 100 steps, as in the thesis."""
    config = EvaluateConfig(
        checkpoints=(checkpoint,), tasks=(task,), baselines=("adam",), lrs=lrs, seeds=seeds,
        output=tmp_path, data=data_for(task == "mnist"),
    )  # fmt: skip
    summary = Evaluation(config).execute()
    rows = summary["tasks"][task]["optimizers"]
    assert rows["adam"]["lr"] not in (lrs[0], lrs[-1])  # the best lies inside
    assert summary["overall"][checkpoint]["sum_ratio"]["mean"] < limit


@pytest.mark.slow
def test_two_workers_give_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know rules of one's own."""
    (tmp_path / "own_rule_of_the_evaluation.py").write_text(OWN_RULE.format(name="evaluation"))
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_rule_of_the_evaluation").Mine
    monkeypatch.setitem(RULES, own.name, RULES.pop(own.name))  # of this test alone
    save_rule(own(), tmp_path / "own.safetensors")
    config = EvaluateConfig(
        checkpoints=(str(tmp_path / "own.safetensors"),), tasks=("digits",), baselines=("sgd",),
        steps=10, seeds=2, tuning_seeds=1, lrs=(0.1, 1.0), output=tmp_path / "one",
    )  # fmt: skip
    one = Evaluation(config).execute()
    two = Evaluation(replace(config, workers=2, output=tmp_path / "two")).execute()
    assert without_times(two) == without_times(one)
