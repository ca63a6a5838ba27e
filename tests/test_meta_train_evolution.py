"""``meta_train`` by evolution strategies: a user's own modules on whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_meta_train import OwnConfig, OwnRule, network, normalized
from test_meta_train import of_a_generator as batches
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from learned_optim import load_record
from learned_optim.meta import FixedTask, ModuleTask, meta_train
from learned_optim.meta.populations.mixture import Draw
from learned_optim.meta.populations.rollout import roll
from learned_optim.meta.whole_runs import TaskPopulation
from learned_optim.rules._base import RULES
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

SHORT: dict[str, Any] = {
    "rule": HorizonConfig(hidden_size=3),
    "start": None,
    "horizon": 8,
    "meta_steps": 3,
    "tasks_per_meta_step": 2,
    "pairs": 2,
    "validation_tasks": 2,
    "validation_every": 2,
    "progress": False,
}


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


# ---- meta_train


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_finished_mixture_is_not_trained_again(tmp_path: Path) -> None:
    tasks = {"plain": regression(), "normalized": regression(normalized)}
    trained = evolve(tasks, tmp_path, weights={"plain": 2, "normalized": 1})
    written = trained.path.stat().st_mtime_ns
    evolve(tasks, tmp_path, weights=[2, 1])
    assert trained.path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"share of normalized: 0.3333 then, 0.5 now"):
        evolve(tasks, tmp_path)


def test_bad_input(tmp_path: Path) -> None:
    def refused(message: str, task: Any = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evolve(task or regression(), tmp_path / "never", **changes)

    refused("'meta_train:Sequential' needs a horizon", horizon=None)
    refused("test_tasks do not apply to a recipe of evolution", test_tasks="quadratic")
    refused("for evaluation only", "regression")
    refused("the loss cannot be computed: mat1", regression(lambda: nn.Linear(5, 1)))
    refused("workers=2 need tasks that can be sent", regression(lambda: network()), workers=2)
    assert not list(tmp_path.glob("never/resume.pt"))


@pytest.mark.slow
def test_workers_give_the_same_bits(tmp_path: Path) -> None:
    one = evolve(regression(), tmp_path / "one")
    two = evolve(regression(), tmp_path / "two", workers=2)
    assert one.rule.fingerprint() == two.rule.fingerprint()
