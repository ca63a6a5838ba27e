"""``meta_train`` by evolution strategies: a user's own modules on whole runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector

from learned_optim import LearnedOptimizer, load_record, load_rule
from learned_optim.meta import FixedTask, ModuleTask, build_tasks, meta_train
from learned_optim.meta.data import DataOptions
from learned_optim.meta.evolution_tasks import RunSource, TaskPopulation, given_family
from learned_optim.meta.populations import Draw, roll
from learned_optim.meta.whole_runs import WholeRuns
from learned_optim.rules import RuleConfig, Segments, State, StepContext, UpdateRule
from learned_optim.rules._config import RULES
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

INPUTS = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, :1] * INPUTS[:, 1:2]).tanh()
SHORT: dict[str, Any] = {
    "rule": HorizonConfig(hidden_size=3),
    "start": "",
    "horizon": 8,
    "meta_steps": 3,
    "tasks_per_meta_step": 2,
    "pairs": 2,
    "validation_tasks": 2,
    "validation_every": 2,
    "progress": False,
}


def batches(generator: Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(96, (8,), generator=generator)
    return INPUTS[index], TARGETS[index]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))


def regression(build: Any = network) -> ModuleTask:
    return ModuleTask(build, batches, nn.functional.mse_loss)


def evolve(tasks: Any, folder: Path, **changes: Any) -> Any:
    return meta_train(tasks, "quick-evolution", folder=folder, **{**SHORT, **changes})


# ---- copies of a task


@pytest.mark.parametrize("build", [network, normalized])
def test_copies_train_as_they_would_alone(build: Any) -> None:
    """Under other weights beside them, with buffers of their own and the same masks."""
    rule = HorizonRule(HorizonConfig(hidden_size=3))
    weights = torch.stack([parameters_to_vector(rule.parameters()).detach()] * 3)
    weights += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    family = FixedTask(regression(build))
    assert family.stackable == (build is network)

    def losses(rows: Tensor) -> Tensor:
        run = Draw(TaskPopulation(family.task, family.stackable), 12, True)
        return roll(rule, rows, run, 5)[0]

    together = losses(weights)
    for index in range(3):
        alone = losses(weights[index : index + 1])[:, 0]
        torch.testing.assert_close(together[:, index], alone, rtol=1e-4, atol=0)
    assert abs(together[-1, 0] - together[-1, 1]) > 1e-4
    assert torch.equal(losses(weights), together)  # nothing is left behind


def test_lengths_are_log_uniform() -> None:
    with given_family(FixedTask(regression())):
        source = RunSource("meta_train:x", 40, 10, DataOptions())
        drawn = [source.draw(seed) for seed in range(60)]
        assert {
            RunSource("meta_train:x", 40, None, DataOptions()).draw(s).steps for s in (0, 1)
        } == {40}
    steps = torch.tensor([float(run.steps) for run in drawn])
    assert steps.min() >= 10
    assert steps.max() <= 40
    assert steps.log().mean() == pytest.approx(math.log(20), abs=0.15)
    assert 0.5 < sum(run.known for run in drawn) / 60 < 0.9  # of the mixtures, 0.7
    assert source.longest_run == 40


# ---- meta_train


@dataclass(frozen=True)
class OwnConfig(RuleConfig):
    lr: float = 0.01


class OwnRule(UpdateRule):
    """SGD with a learned rate."""

    name = "own-of-test-meta-train-evolution"
    Config = OwnConfig
    config: OwnConfig

    def __init__(self, config: OwnConfig | None = None) -> None:
        super().__init__(config)
        self.log_lr = nn.Parameter(torch.tensor([self.config.lr]).log())

    def init_state(self, param: Tensor) -> State:
        return {}

    def forward(
        self, grad: Tensor, state: State, param: Tensor, segments: Segments, context: StepContext
    ) -> tuple[Tensor, State]:
        return -self.log_lr.exp() * grad, {}


RULES.pop(OwnRule.name)  # of this module's tests alone


def test_it_learns_and_the_checkpoint_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that is far too small grows, and the ratio to AdamW falls with it."""
    monkeypatch.setitem(RULES, OwnRule.name, OwnRule)
    fields = {"rule": OwnConfig(0.001), "meta_lr": 0.5, "meta_steps": 6, "horizon": 20}
    trained = evolve(regression(), tmp_path / "run", **fields, sigma=0.3)
    assert trained.path == tmp_path / "run" / "run.safetensors"
    assert trained.rule.log_lr.exp().item() > 0.0025
    ratios = [m.ratio_to_adamw for m in trained.history if m.ratio_to_adamw is not None]
    assert len(ratios) == 3
    assert ratios[-1] < ratios[0]
    record = load_record(trained.path)
    assert record["ratio_to_adamw"] == ratios[-1]
    assert record["trained_for"] == "runs of 20 steps of meta_train:Sequential"
    assert "1 tensors" not in str(record["data"])
    assert "4 tensors of 37 parameters" in record["data"]["task meta_train:Sequential"]
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), trained.path)
    losses = []
    for step in range(20):
        x, y = batches(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_after_an_interruption_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"plain": regression(), "normalized": regression(normalized)}
    whole = evolve(tasks, tmp_path / "whole", weights={"plain": 2, "normalized": 1})
    step, done = WholeRuns.train_round, []

    def interrupted(self: WholeRuns, number: int, *rest: Any) -> Any:
        done.append(number)
        if len(done) == 2:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    monkeypatch.setattr(WholeRuns, "train_round", interrupted)
    again = {**SHORT, "weights": [2, 1]}
    with pytest.raises(KeyboardInterrupt):
        meta_train(tasks, "quick-evolution", folder=tmp_path / "parts", **again)
    parts = meta_train(tasks, "quick-evolution", folder=tmp_path / "parts", **again)
    assert done == [1, 2, 2, 3]
    assert parts.rule.fingerprint() == whole.rule.fingerprint()
    written = parts.path.stat().st_mtime_ns
    meta_train(tasks, "quick-evolution", folder=tmp_path / "parts", **again)
    assert parts.path.stat().st_mtime_ns == written  # nothing is left to do
    with pytest.raises(ValueError, match=r"share of normalized: 0.3333 then, 0.5 now"):
        evolve(tasks, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"another recipe \(different: pairs\)"):
        meta_train(tasks, "quick-evolution", folder=tmp_path / "parts", **{**again, "pairs": 3})


def test_registered_tasks_by_name(tmp_path: Path) -> None:
    trained = evolve("quadratic", tmp_path)
    assert trained.record["data"] == "task family 'quadratic', meta-training split alone"
    assert trained.record["recipe"]["task"] == "quadratic"
    assert load_rule(tmp_path).fingerprint() == trained.rule.fingerprint()


def test_bad_input(tmp_path: Path) -> None:
    def refused(message: str, task: Any = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evolve(task or regression(), tmp_path / "never", **changes)

    refused("'meta_train:Sequential' needs a horizon", horizon=None)
    refused(r"unknown field 'epochs' of a recipe", epochs=3)
    refused("test_tasks do not apply to a recipe of evolution", test_tasks="quadratic")
    refused("for evaluation only", "regression")
    refused("unknown task 'quadratik'", "quadratik")
    refused("the loss cannot be computed: mat1", regression(lambda: nn.Linear(5, 1)))
    refused("workers=2 need tasks that can be sent", regression(lambda: network()), workers=2)
    assert not list(tmp_path.glob("never/resume.pt"))


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = evolve(regression(), tmp_path, progress=True)
    out, err = capsys.readouterr()
    lines = [line.removeprefix("meta_train: ") for line in err.splitlines()]
    assert out == ""
    assert lines[0] == f"starting in {tmp_path}: 3 meta-steps"
    assert lines[1].startswith("meta-step 2/3: meta-loss ")
    ratio = trained.history[1].ratio_to_adamw
    assert f"{ratio:.2f} of tuned AdamW's, " in lines[1]
    assert lines[1].endswith(" left")
    assert lines[2].startswith("meta-step 3/3: ")
    assert not lines[2].endswith(" left")
    assert lines[3].startswith("final loss on 2 validation runs: ")
    assert lines[4] == f"wrote {trained.path}"


@pytest.mark.slow
def test_workers_give_the_same_bits(tmp_path: Path) -> None:
    one = evolve(regression(), tmp_path / "one")
    two = evolve(regression(), tmp_path / "two", workers=2)
    assert one.rule.fingerprint() == two.rule.fingerprint()


def test_the_family_is_that_of_the_name() -> None:
    source = RunSource("quadratic", 10, None, DataOptions())
    assert type(source.family()) is type(build_tasks("quadratic"))
    with pytest.raises(ValueError, match=r"was given to meta_train\(\) as an object"):
        RunSource("meta_train:x", 10, None, DataOptions()).family()
