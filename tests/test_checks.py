"""Tasks that meta-training can do nothing with are refused before it begins; the others train."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_rule
from test_trainer import SMALL
from torch import Generator, Tensor, nn

from learned_optim.meta import (
    ESTIMATORS,
    EstimatorOptions,
    FixedTask,
    MetaGradient,
    MetaTrainer,
    ModuleTask,
    Optimizees,
    Task,
)
from learned_optim.meta.checks import check_family, check_finite
from learned_optim.meta.seeding import seeded
from learned_optim.rules.classical import SGDRule


class Part(Task):
    """A small regression of which single methods are replaced."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        vars(self).update(methods)

    def init(self, generator: Generator) -> dict[str, Tensor]:
        return {"w": torch.randn(3, generator=generator)}

    def batch(self, generator: Generator) -> tuple[Tensor, ...]:
        return torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)

    def loss(self, params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        return (x @ params["w"] - y).square().mean()


CALLS = count(1)  # of a loss that keeps state

#: What is only trained is refused for these, too.
NOT_FINITE = [
    ({"loss": lambda p, b: p["w"].square()}, r"of shape \(\), and has shape \(3,\): average over"),
    ({"loss": lambda p, b: p["w"].sum() * torch.nan}, "the loss is nan at the initial parameters"),
    ({"loss": lambda p, b: (p["w"] * 0).sqrt().sum()}, "the gradient of 'w' is not finite"),
]
USELESS = [
    *NOT_FINITE,
    ({"init": lambda g: {}}, r"has no parameters to optimize: init\(\) returned \{\}"),
    ({"init": lambda g: {"w": torch.ones(3).int()}}, r"'w' is a torch\.int32, and parameters are"),
    ({"init": lambda g: {"w": [1.0]}}, "'w' is a list, and parameters are floating tensors"),
    ({"batch": lambda g: {"x": torch.ones(2), "y": 1}}, r"dict with 'x', 'y': return tuple\(batch"),
    ({"batch": lambda g: torch.ones(2)}, r"and is a Tensor: return \(x,\) for a single tensor"),
    ({"batch": lambda g: (torch.ones(2), 3)}, r"and is \(Tensor, int\)"),
    ({"loss": lambda p, b: p["w"].sum() + torch.inf}, "the loss is inf at the initial parameters"),
    ({"loss": lambda p, b: 1.0}, "is a float, through which no gradient flows"),
    ({"loss": lambda p, b: b[0].sum()}, "does not depend on the parameters"),
    ({"loss": lambda p, b: p["w"].detach().sum()}, "does not depend on the parameters"),
    ({"init": lambda g: {"w": torch.ones(3), "idle": torch.ones(2)}}, "does not use .* idle"),
    ({"loss": lambda p, b: next(CALLS) * p["w"].norm()}, r"state that init\(\) does not reset"),
    ({"loss": lambda p, b: p["w"] @ torch.ones(2)}, "the loss cannot be computed: .*size"),
    ({"init": lambda g: {"w": torch.ones(3, device="meta")}}, "is on meta, and meta-training"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), USELESS, ids=[message for _, message in USELESS])
def test_useless_tasks_are_refused(parts: dict[str, Callable[..., Any]], message: str) -> None:
    check_family(FixedTask(Part()), "part")
    with pytest.raises(ValueError, match=rf"task 'part'.*{message}"):
        check_family(FixedTask(Part(**parts)), "part")


@pytest.mark.parametrize(("parts", "message"), NOT_FINITE)
def test_what_is_only_trained_must_be_finite(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'part': .*{message}"):
        check_finite(Part(**parts), "part")
    idle = {"init": lambda g: {"w": torch.ones(3), "idle": torch.ones(2)}}
    check_finite(Part(**idle), "part")


def changing_batches(generator: Generator) -> tuple[Tensor, Tensor]:
    size = int(torch.randint(4, 9, (), generator=generator))
    return torch.randn(size, 3, generator=generator), torch.randn(size, generator=generator)


def test_batches_of_changing_shapes_train_alone() -> None:
    family = FixedTask(Part(batch=changing_batches))
    check_family(family, "changing")
    assert not family.stackable
    assert "equal size" in family.alone_because
    with pytest.raises(ValueError, match=r"side by side .*changing shapes: set stackable=False"):
        check_family(FixedTask(Part(batch=changing_batches), stackable=True), "changing")


# ---- networks that keep state or draw at random


def images(generator: Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 1, 8, 8, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def network(*extra: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        convolution = nn.Conv2d(1, 4, 3, stride=2)
        return nn.Sequential(convolution, *extra, nn.Flatten(), nn.Linear(36, 3))

    return build


ALONE = {
    "batch norm": network(nn.BatchNorm2d(4)),
    "dropout": network(nn.Dropout(0.3)),
    "both": network(nn.BatchNorm2d(4), nn.Dropout2d(0.3)),
}
TOGETHER = {
    "plain": network(nn.ReLU()),
    "group norm": network(nn.GroupNorm(2, 4)),
    "statistics of the batch": network(nn.BatchNorm2d(4, track_running_stats=False)),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_networks_without_state_are_stackable(name: str) -> None:
    assert FixedTask(ModuleTask(TOGETHER[name], images)).stackable


@pytest.mark.parametrize("build", [ALONE["both"], TOGETHER["plain"]])
def test_networks_train_and_give_the_same_figures_again(build: Any, tmp_path: Path) -> None:
    """The state of the global generator does not matter."""

    def figures(run: str) -> list[float]:
        torch.seed()
        family = FixedTask(ModuleTask(build, images))
        recipe = replace(SMALL, tasks_per_meta_step=1, epochs=2, runs_per_epoch=1, coordinates=None)
        trainer = MetaTrainer(recipe, tmp_path / run, family=family, against_adamw=False)
        trainer.train()
        return [trainer.validate(), *(m.validation for m in trainer.history)]

    first = figures("one")
    assert first[0] == first[2]
    assert figures("two") == first
    assert all(map(math.isfinite, first))


@pytest.mark.parametrize(
    ("estimator", "kind"), [("replay", "both"), ("full", "both"), ("replay", "plain")]
)
def test_several_in_a_meta_step_do_not_see_each_other(estimator: str, kind: str) -> None:
    """Buffers and masks are each one's own: the meta-gradient of four is the mean over each alone.

    To float64 precision, one after another or, of a plain network, side by side.
    """
    rule = random_rule("equivariant", torch.float64)

    def build() -> nn.Module:
        # No bias: before batch norm, its gradient is rounding noise, which the rule enlarges.
        convolution = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        rest = copy.deepcopy((ALONE | TOGETHER)[kind]()[1:])
        return nn.Sequential(convolution, *rest).double()

    task = ModuleTask(build, images)

    def estimated(*runs: int) -> tuple[MetaGradient, Optimizees]:
        generators = [seeded("several", run) for run in runs]
        tasks, stacked = [task for _ in runs], kind in TOGETHER
        optimizees = Optimizees(rule, tasks, generators, torch.float64, stacked=stacked)
        return ESTIMATORS[estimator](rule, optimizees, 4, EstimatorOptions()), optimizees

    together, optimizees = estimated(0, 1, 2, 3)
    each = [estimated(run) for run in range(4)]
    torch.testing.assert_close(
        together.losses, torch.cat([meta.losses for meta, _ in each], 1), rtol=1e-12, atol=0
    )
    for index, grad in enumerate(together.grads):
        mean = torch.stack([meta.grads[index] for meta, _ in each]).mean(0)
        torch.testing.assert_close(grad, mean, rtol=1e-9, atol=1e-12 * float(mean.abs().max()))
    if kind == "both":  # else ordered by name first
        packed = torch.cat([alone.packed for _, alone in each])
        torch.testing.assert_close(optimizees.packed, packed, rtol=1e-10, atol=1e-13)


def test_autograd_and_replay_agree_where_buffers_change_the_loss() -> None:
    """Two forward passes in a step, as autograd needs, see the same buffers and the same masks."""

    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()  # assigned anew, not updated in place
            return self.layer(x) + self.mean

    def batches(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(8, 3, generator=generator), torch.ones(8, 1)

    rule = random_rule("equivariant", torch.float64)
    found = []
    for estimator in ("replay", "autograd"):
        task = ModuleTask(lambda: Drifting().double(), batches, nn.functional.mse_loss)
        assert FixedTask(task).stackable is False
        optimizees = Optimizees(
            rule, [task, task], [seeded(1), seeded(2)], torch.float64, stacked=False
        )
        found.append(ESTIMATORS[estimator](rule, optimizees, 5, EstimatorOptions()))
        assert task.module.mean.item() == 0.0  # a trial or a run leaves nothing in the original
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=1e-12, atol=0)
    for a, b in zip(found[0].grads, found[1].grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("name", ALONE)
def test_what_is_wrongly_said_to_be_stackable_is_refused(name: str) -> None:
    family = FixedTask(ModuleTask(ALONE[name], images), stackable=True)
    with pytest.raises(ValueError, match=r"cannot be computed side by side .*stackable=False"):
        check_family(family, "wrong")


# ---- frozen parameters


class Adapted(nn.Module):
    """A frozen layer and a trainable one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 5)
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.parametrize("init_std", [None, 0.1])
def test_frozen_parameters_stay_frozen(init_std: float | None) -> None:
    def batches(generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)

    torch.seed()
    task = ModuleTask(Adapted, batches, nn.functional.mse_loss, init_std=init_std)
    frozen = task.module.backbone.weight.clone()
    params = task.init(seeded(0))
    assert set(params) == {"head.weight", "head.bias"}
    check_family(FixedTask(task), "adapted")
    optimizees = Optimizees(SGDRule(), [task, task], [seeded(1), seeded(2)])
    for _ in range(3):
        optimizees.advance(SGDRule())
    assert torch.equal(task.module.backbone.weight, frozen)
    # The same in every process, whatever the global generator has drawn before.
    torch.seed()
    again = ModuleTask(Adapted, batches, nn.functional.mse_loss, init_std=init_std)
    assert torch.equal(again.module.backbone.weight, frozen)
