"""``meta_train``: a user's own modules, batches and rules, resumed to the same bits."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compat.common import descend
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer, load_record, load_rule
from learned_optim.evaluation import EvaluateConfig, Evaluation
from learned_optim.meta import (
    FixedTask,
    MetaTrained,
    MetaTrainer,
    ModuleTask,
    Optimizees,
    TaskMixture,
    build_tasks,
    meta_train,
)
from learned_optim.meta.recipes import recipe_from_json
from learned_optim.meta.seeding import seeded
from learned_optim.meta.unrolls import Unrolls
from learned_optim.rules import State, UpdateRule
from learned_optim.rules._base import RULES
from learned_optim.rules.classical import SGDConfig, SGDRule
from learned_optim.rules.equivariant import EquivariantConfig

INPUTS = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, :1] * INPUTS[:, 1:2]).tanh()
DATA = TensorDataset(INPUTS, TARGETS)
SHORT: dict[str, Any] = {
    "epochs": 2,
    "runs_per_epoch": 2,
    "horizon": 6,
    "truncation": 3,
    "average": 0.5,
    "validation_runs": 2,
    "test_runs": 2,
    "progress": False,
}


def network(width: int = 6, *extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), *extra, nn.Tanh(), nn.Linear(width, 1))


def normalized() -> nn.Module:
    return network(6, nn.BatchNorm1d(6), nn.Dropout(0.2))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, **{"batch_size": 16, "shuffle": True, **options})


def regression(build: Any = network, batches: Any = None, **options: Any) -> ModuleTask:
    return ModuleTask(build, loader() if batches is None else batches, F.mse_loss, **options)


def short(task: Any, folder: Path, **fields: Any) -> MetaTrained:
    return meta_train(task, folder=folder, **{**SHORT, **fields})


def of_a_generator(generator: Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(96, (8,), generator=generator)
    return INPUTS[index], TARGETS[index]


# ---- what is refused


USELESS: list[tuple[Callable[[], ModuleTask], str]] = [
    (lambda: regression(batches=loader(batch_size=100, drop_last=True)),
     "no batches: a DataLoader of 96 examples with batch_size=100 and drop_last=True gives none"),
    (lambda: regression(batches=[]), "no batches: the list of them is empty"),
    (lambda: regression(batches=lambda: iter(())), "and is a tuple_iterator"),
    (lambda: regression(batches=[(INPUTS, [1, 2])]), "its entry 1 is a list: convert it"),
    (lambda: regression(batches=[(INPUTS, TARGETS, TARGETS)]), "one of 3 tensors: give loss="),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), USELESS, ids=[message for _, message in USELESS])
def test_useless_tasks_fail_before_anything_is_written(
    make: Callable[[], ModuleTask], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"task .*{message}"):
        short([regression(), make()], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_modules_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"build must return an nn.Module, and returned a int"):
        regression(lambda: 3)
    with pytest.raises(ValueError, match=r"0.weight, 0.bias of Sequential have no shape before"):
        regression(lambda: nn.Sequential(nn.LazyLinear(3)))


# ---- modules


def test_a_module_keeps_its_weights_and_a_function_makes_fresh_ones() -> None:
    module = network()
    fixed, fresh = regression(module), regression(network)
    start = [fixed.init(seeded(run)) for run in range(2)]
    assert all(torch.equal(p, start[0][name]) for name, p in module.named_parameters())
    assert all(torch.equal(start[0][name], start[1][name]) for name in start[0])
    optimizees = Optimizees(SGDRule(), [fixed], [seeded(0)])
    before = [p.detach().clone() for p in module.parameters()]
    optimizees.advance(SGDRule())
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    weights = [fresh.init(seeded(run))["0.weight"] for run in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_any_loss_of_module_and_batch() -> None:
    """A dict of tensors reaches the loss as a dict, side by side under vmap too."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(module(batch["x"]), batch["y"]) + batch["weight"].mean()

    def batches(generator: Generator) -> dict[str, Tensor]:
        x, y = of_a_generator(generator)
        return {"x": x, "y": y, "weight": torch.ones(3)}

    task, plain = ModuleTask(network, batches, loss=loss), regression(batches=of_a_generator)
    assert FixedTask(task).stackable
    sides = [Optimizees(SGDRule(), [t, t], [seeded(0), seeded(1)]) for t in (task, plain)]
    losses = [torch.stack([side.advance(SGDRule()) for _ in range(3)]) for side in sides]
    torch.testing.assert_close(losses[0], losses[1] + 1)


def test_a_network_in_double_precision_trains_in_single(tmp_path: Path) -> None:
    trained = short(regression(lambda: network().double()), tmp_path)
    assert trained.record["data"]["task meta_train:Sequential"].startswith("4 tensors")
    assert all(map(math.isfinite, (line.validation or math.nan for line in trained.history)))


def test_a_recurrent_network_with_tied_weights_trains(tmp_path: Path) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.body = nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.embedding(tokens))[0])

    tokens = torch.randint(5, (32, 6), generator=seeded("tokens"))
    task = ModuleTask(
        Language,
        DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True),
        loss=lambda m, b: F.cross_entropy(m(b[0])[:, :-1].flatten(0, 1), b[0][:, 1:].flatten()),
    )
    trained = short(task, tmp_path, tasks_per_meta_step=2)
    assert len(task.init(seeded(0))) == 5  # the tied matrix once
    assert 1.0 < trained.record["validation"] / 6 < 2.5  # log(5) a step, or not far from it


# ---- meta-training


def test_it_learns(tmp_path: Path) -> None:
    task, fields = regression(), {"runs_per_epoch": 5, "horizon": 20, "truncation": 10}
    trained = short(task, tmp_path / "run", tasks_per_meta_step=4, meta_lr=0.1, **fields)
    recipe = recipe_from_json(trained.record["recipe"])
    before = MetaTrainer(recipe, tmp_path / "untrained", family=FixedTask(task))
    untrained, validation = before.validate(), trained.record["validation"]
    assert untrained == pytest.approx(6.56, rel=0.02)
    assert validation == pytest.approx(5.57, rel=0.05)
    assert trained.path == tmp_path / "run" / "run.safetensors"
    assert load_record(trained.path) == trained.record
    assert trained.record["test"]["mean"] == pytest.approx(validation, rel=0.4)
    assert "3 tensors" not in str(trained.record["data"])
    assert "4 tensors of 37 parameters" in str(trained.record["data"])


def test_users_get_what_was_measured(tmp_path: Path) -> None:
    """A loop with the checkpoint's own settings has the losses of a validation run."""
    task = regression(batches=of_a_generator)
    trained = short(task, tmp_path, rule="equivariant")
    draws = seeded("user")
    optimizees = Optimizees(trained.rule, [task], [draws])
    measured = [optimizees.advance(trained.rule).item() for _ in range(SHORT["horizon"])]
    draws, model = seeded("user"), network()
    model.load_state_dict(task.init(draws))
    optimizer = LearnedOptimizer(model.parameters(), trained.path)

    def loss() -> Tensor:
        x, y = of_a_generator(draws)
        return F.mse_loss(model(x), y)

    assert descend(optimizer, SHORT["horizon"], loss) == pytest.approx(measured, rel=1e-3)
    assert optimizer.rule.trained_steps == SHORT["horizon"]


def test_after_an_interruption_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: str) -> MetaTrained:
        tasks = {"normalized": regression(normalized), "plain": regression()}
        fields = {"weights": {"normalized": 2, "plain": 1}, "epochs": 3, "tasks_per_meta_step": 2}
        return short(tasks, tmp_path / folder, **fields)

    whole = train("whole")
    run, calls = Unrolls.train_run, []

    def interrupted(self: Unrolls, optimizer: Any, epoch: int, index: int) -> Any:
        calls.append((epoch, index))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, optimizer, epoch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Unrolls, "train_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
        assert calls[-1] == (2, 1)
    torch.seed()
    random.seed()
    parts = train("parts")
    assert parts.rule.fingerprint() == whole.rule.fingerprint()
    assert parts.record == whole.record
    assert [m.validation for m in parts.history] == [m.validation for m in whole.history]
    # A third call finds everything done, and the files as they were.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors")}
    assert train("parts").record == whole.record
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == 2


#: Other data, another activation, more dropout.
CHANGED: list[dict[str, Any]] = [
    {"batches": [(INPUTS + 0.1, TARGETS)]},
    {"build": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))},
    {"build": lambda: network(6, nn.Dropout(0.3))},
]


def test_a_folder_of_other_tasks_is_refused(tmp_path: Path) -> None:
    def train(changed: dict[str, Any], **fields: Any) -> MetaTrained:
        task = {"build": lambda: network(6), "batches": [(INPUTS, TARGETS)], **changed}
        return short(regression(**task), tmp_path, epochs=1, runs_per_epoch=1, **fields)

    train({})
    train({})
    for changed in CHANGED:
        with pytest.raises(
            ValueError, match=r"other conditions \(task .*4 tensors .* then, .* now"
        ):
            train(changed)
    with pytest.raises(ValueError, match="a run of another recipe"):
        train({}, horizon=11)
    with pytest.raises(
        ValueError, match=r"given to meta_train\(\) as an object: go on from Python"
    ):
        build_tasks("meta_train:Sequential")


def test_weights_are_the_proportion_of_draws() -> None:
    narrow, wide = regression(), regression(lambda: network(9))
    mixture = TaskMixture({"narrow": narrow, "wide": wide}, {"narrow": 3, "wide": 1})
    assert mixture.shares == {"narrow": 0.75, "wide": 0.25}
    tasks = [mixture.sample(seeded("draw", index)) for index in range(2000)]
    share = sum(task is narrow for task in tasks) / 2000
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 2000) ** 0.5)
    with pytest.raises(ValueError, match=r"weight for each and no other, got weights for narrow$"):
        TaskMixture({"narrow": narrow, "wide": wide}, {"narrow": 1})
    with pytest.raises(ValueError, match=r"must be positive and finite, got wide: 0"):
        TaskMixture({"narrow": narrow, "wide": wide}, {"narrow": 1, "wide": 0})
    with pytest.raises(ValueError, match="2 tasks need as many weights, got 3"):
        meta_train([narrow, wide], folder="never", weights=[1, 2, 3])
    with pytest.raises(ValueError, match="for several tasks, and there is one"):
        meta_train(narrow, folder="never", weights=[1])


def test_registered_tasks_and_own_ones_in_a_mixture(tmp_path: Path) -> None:
    trained = short(["quadratic", regression(), regression()], tmp_path)
    assert trained.record["recipe"]["task"] == "meta_train:quadratic+Sequential+Sequential-2"
    shares = {k: v for k, v in trained.record["data"].items() if k.startswith("share")}
    assert set(shares.values()) == {"0.3333"}
    by_name = short("quadratic", tmp_path / "named")
    assert by_name.record["recipe"]["task"] == "quadratic"
    assert by_name.record["data"] == "task family 'quadratic', meta-training split alone"


def test_other_tasks_for_the_test_figures(tmp_path: Path) -> None:
    far = regression(batches=[(INPUTS, TARGETS + 10)])
    near = short(regression(), tmp_path / "near")
    tested = short(regression(), tmp_path / "far", test_tasks=far)
    assert tested.rule.fingerprint() == near.rule.fingerprint()
    assert tested.record["test"]["mean"] > 20 * near.record["test"]["mean"]
    assert tested.record["test"]["task"] == tested.record["recipe"]["test_task"]
    assert near.record["recipe"]["test_task"] is None
    with pytest.raises(ValueError, match=r"\(test\)': there are no batches"):
        short(regression(), tmp_path / "never", test_tasks=regression(batches=[]))
    assert not (tmp_path / "never").exists()


# ---- recipes and rules


class OwnConfig(SGDConfig):
    pass


class OwnRule(UpdateRule):
    """SGD with a learned rate, which does not split into observation and response."""

    name = "own-of-test-meta-train"
    Config = OwnConfig
    config: OwnConfig

    def __init__(self, config: OwnConfig | None = None) -> None:
        super().__init__(config)
        self.log_lr = nn.Parameter(torch.tensor(self.config.lr).log())

    def init_state(self, param: Tensor) -> State:
        return {}

    def forward(self, grad: Tensor, *_: Any) -> tuple[Tensor, State]:
        return -self.log_lr.exp() * grad, {}


RULES.pop(OwnRule.name)  # of this module's tests alone


def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, OwnRule.name, OwnRule)
    trained = short(regression(normalized), tmp_path, rule=OwnConfig(0.02), meta_lr=0.3)
    assert trained.rule.log_lr.exp().item() > 0.04  # 0.02 is far too slow for ten steps
    assert type(load_rule(trained.path)) is OwnRule


def test_fields_of_the_recipe(tmp_path: Path) -> None:
    def refused(message: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=message):
            meta_train(regression(), folder=tmp_path / "never", **fields)

    refused(r"unknown field 'horizn' of a recipe. Did you mean 'horizon'\?", horizn=3)
    refused("unknown field 'task' of a recipe", task="digits")
    refused("unknown field 'test_task' of a recipe", test_task="digits")
    refused("rule must be a configuration, .* and is a SGDRule", rule=SGDRule())
    refused("workers=2 apply to recipes of evolution strategies", workers=2)
    refused("unknown update rule 'horizn'", rule="horizn")
    with pytest.raises(ValueError, match="must be a Task or a TaskFamily, and is a Linear"):
        meta_train([nn.Linear(1, 1)], folder=tmp_path)  # type: ignore[list-item]
    first = short(regression(), tmp_path / "a", meta_lr=0.02, rule="equivariant")
    recipe = first.record["recipe"]
    assert (recipe["meta_lr"], recipe["meta_lr_final"]) == (0.02, pytest.approx(0.002))
    small = EquivariantConfig(hidden_size=4)
    second = short(regression(), tmp_path / "b", recipe="quick", rule=small)
    third = short(regression(), tmp_path / "c", start=str(second.path))
    assert third.rule.config == small
    assert third.record["start"] == second.rule.fingerprint()


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = short(regression(normalized), tmp_path, progress=True, tasks_per_meta_step=2)
    out, err = capsys.readouterr()
    plain = short(regression(normalized), tmp_path / "b", against_adamw=False)
    assert [m.ratio_to_adamw for m in plain.history] == [None, None]
    note, *_, figures, wrote = err.splitlines()
    assert out == ""
    assert "one optimizee after another: its loss cannot be computed for several at" in note
    assert "4/4" in err
    assert f"{trained.record['ratio_to_adamw']:.2f} of tuned AdamW's, best epoch" in figures
    assert wrote == f"wrote {trained.path}"


# ---- evaluation of one's own tasks


def test_evaluation_of_tasks_without_a_name(tmp_path: Path) -> None:
    config = EvaluateConfig(
        checkpoints=("coordinatewise",), tasks=("mine",), baselines=("adam-1e-3",),
        steps=5, seeds=1, tuning_seeds=1, output=tmp_path / "mine",
    )  # fmt: skip
    summary = Evaluation(config, tasks={"mine": regression()}).execute()
    assert summary["tasks"]["mine"]["optimizers"]["coordinatewise"]["lr"] == 1.0

    def refused(message: str, changes: dict[str, Any], **tasks: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Evaluation(replace(config, **changes), tasks=tasks)

    refused(r"other conditions \(task mine", {}, mine=regression(lambda: network(9)))
    refused("tasks has other, which", {}, mine=regression(), other=regression())
    elsewhere = {"workers": 2, "output": tmp_path / "two"}
    refused("workers=2 need tasks that can", elsewhere, mine=regression(lambda: network()))
