"""Populations: each copy is a training of its own, and the layers are those of torch.nn."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import pytest
import torch
from compat.common import descend, flat, step_with
from torch import Tensor, nn

from learned_optim import LearnedOptimizer
from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Params, Population, UnusableTaskError
from learned_optim.meta.populations._perceptron import Perceptron
from learned_optim.meta.populations.boundary import BoundaryValue
from learned_optim.meta.populations.classification import Classification, FewExamples
from learned_optim.meta.populations.convolutions import ConvNet
from learned_optim.meta.populations.mixture import MIXTURES, Draw, draw, run_generators
from learned_optim.meta.populations.quadratics import Quadratic
from learned_optim.meta.populations.restarts import Restart
from learned_optim.meta.populations.rollout import (
    ADAMW_LRS,
    CopiesOptimizer,
    fitness,
    rise,
    roll,
    roll_adamw,
    scores,
)
from learned_optim.meta.populations.sequences import Sequences
from learned_optim.meta.populations.tabular import HeldOutTeacher, Teacher
from learned_optim.meta.sampler import Sampler
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule
from tests.conftest import random_rule

P = TypeVar("P", bound=Population)
NO_DATA = DataOptions(download=False)
IMAGE_MODULES = ("classification", "convolutions", "autoencoders", "sequences")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in the place of MNIST's."""

    def random_images(data: DataOptions, side: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (1200,), generator=generator(1))
        return torch.rand(1200, 1, side, side, generator=generator(2)), labels

    for module in IMAGE_MODULES:
        name = f"learned_optim.meta.populations.{module}.meta_images"
        monkeypatch.setattr(name, random_images)


def build(family: type[P], seed: int) -> P:
    make: Callable[[Sampler, DataOptions], P] = family
    return make(Sampler(generator(seed)), NO_DATA)


def usable(family: type[P], seeds: int) -> Iterator[P]:
    """Tasks of seeds from 0; the mixture draws again where one is unusable."""
    for seed in range(seeds):
        with suppress(UnusableTaskError):
            yield build(family, seed)


def find(family: type[P], fits: Callable[[P], bool]) -> P:
    """The first of a family's tasks for which ``fits`` holds."""
    return next(t for t in usable(family, 100) if fits(t))


def copies_of(task: Population, copies: int) -> Params:
    """Copies of the initial parameters, each moved a little by random numbers of its own."""
    noise = generator(3)
    return {
        name: value + 0.03 * torch.randn(copies, *value.shape, generator=noise)
        for name, value in task.initial(generator(0)).items()
    }


# ---- families


@pytest.mark.parametrize("family", MIXTURES["populations-3"], ids=lambda f: f.__name__)
@pytest.mark.usefixtures("images")
def test_copies_do_not_touch_each_other(family: type[Population]) -> None:
    """Losses are those of each copy alone, and so are gradients."""
    for task in usable(family, 2 if family is Restart else 6):
        params = {name: value.requires_grad_() for name, value in copies_of(task, 3).items()}
        batch = task.batch(generator(1))
        losses = task.losses(params, batch)
        assert losses.shape == (3,)
        assert torch.isfinite(losses).all()
        grads = torch.autograd.grad(losses[1], list(params.values()), retain_graph=True)
        for grad in grads:
            assert grad[0].abs().max() == grad[2].abs().max() == 0
        assert any(grad[1].abs().max() > 0 for grad in grads)
        for copy in range(3):
            alone = {name: value[copy : copy + 1] for name, value in params.items()}
            torch.testing.assert_close(
                task.losses(alone, batch)[0], losses[copy], rtol=1e-5, atol=1e-6
            )


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("mode", ["same", "shift", "adapter", "labels"])
def test_restarts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin where training ended; an adapter begins as the network that it adapts."""
    first: dict[str, Tensor] = {}

    def cheap(self: Restart, sampler: Sampler) -> Params:
        first.clear()
        first.update(self.base.init(generator(0)))
        sampler.integer(0, 300)
        return first

    monkeypatch.setattr(Restart, "_trained", cheap)
    task = find(Restart, lambda t: t.mode == mode)
    batch, params = task.batch(generator(1)), task.initial(generator(2))
    base = task.base.loss({name: value[None] for name, value in first.items()}, batch)
    stacked = {name: value[None] for name, value in params.items()}
    torch.testing.assert_close(task.losses(stacked, batch), base)
    assert (set(params) == set(first)) == (mode != "adapter")


def test_scales_and_jitter_change_gradients_and_not_losses() -> None:
    task = build(Teacher, 0)
    batch, plain = task.batch(generator(1)), task.initial(generator(0))
    before = task.losses({name: value[None] for name, value in plain.items()}, batch)
    task.scales = dict.fromkeys(plain, 2.0)
    scaled = task.initial(generator(0))
    assert all(torch.equal(scaled[name] * 2, plain[name]) for name in plain)
    after = task.losses({name: value[None] for name, value in scaled.items()}, batch)
    torch.testing.assert_close(after, before)
    rule, run = random_rule("horizon"), run_of()
    steady, _ = roll(rule, flat(rule)[None], run, seed=1)
    run.task.jitter = 0.5
    jittered, _ = roll(rule, flat(rule)[None], run, seed=1)
    assert steady[0] == jittered[0]
    assert not torch.equal(steady, jittered)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("family", [FewExamples, HeldOutTeacher])
def test_held_out_examples_are_in_no_batch(family: type[FewExamples | HeldOutTeacher]) -> None:
    """Their loss is that of the task, whatever the units of the parameters."""
    task = find(family, lambda t: t.net.norm == "none")
    others, targets, _ = task.held_out
    rows = task.pixels if isinstance(task, FewExamples) else task.examples
    count = 512 if isinstance(task, FewExamples) else (len(others) + len(rows)) // 3
    assert len(others) == len(targets) == count
    assert not {*map(tuple, others.tolist())} & {*map(tuple, rows.tolist())}
    params = copies_of(task, 2)
    found = task.losses(params, task.held_out)
    task.scales = dict.fromkeys(params, 2.0)
    halved = {name: value / 2 for name, value in params.items()}
    torch.testing.assert_close(task.losses(halved, task.held_out), found)


# ---- against torch.nn


def stacked(modules: list[nn.Module], names: Iterable[str]) -> Params:
    """Parameters of modules side by side, under our names for them, in the same order."""
    columns = zip(*(module.parameters() for module in modules), strict=True)
    return {name: torch.stack(each).detach() for name, each in zip(names, columns, strict=True)}


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_perceptron_is_a_sequence_of_torch_layers(norm: str) -> None:
    net = Perceptron(5, 3, [7, 7], "gelu", "torch", norm)
    between = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm]

    def module() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in in (5, 7):
            layers += [nn.Linear(fan_in, 7), between(7), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(7, 3))

    modules = [module() for _ in range(2)]
    params, x = stacked(modules, net.init(generator())), torch.randn(11, 5)
    torch.testing.assert_close(net(params, x), torch.stack([m(x) for m in modules]))


@pytest.mark.parametrize("post_norm", [False, True])
def test_transformer_block_is_that_of_torch(post_norm: bool) -> None:
    task = find(Sequences, lambda t: t.kind == "attention")
    task.post_norm, width = post_norm, task.width
    inner = task.expansion * width
    modules: list[nn.Module] = [
        nn.TransformerEncoderLayer(
            width, task.heads, inner, 0.0, "gelu", batch_first=True, norm_first=not post_norm
        )
        for _ in range(2)
    ]
    params = stacked(modules, task._init_block("0.", generator()))
    x = torch.randn(2, 3, 5, width)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = [m(x[i], src_mask=mask, is_causal=True) for i, m in enumerate(modules)]
    torch.testing.assert_close(task._block(params, x, "0."), torch.stack(expected))


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_recurrent_layers_are_those_of_torch(kind: str) -> None:
    task = find(Sequences, lambda t: t.kind == kind)
    cell = {"gru": nn.GRU, "rnn": nn.RNN}[kind]
    modules: list[nn.Module] = [cell(task.width, task.width, batch_first=True) for _ in range(2)]
    params = stacked(modules, ("input", "recurrent", "input_bias", "recurrent_bias"))
    x = torch.randn(2, 3, task.length, task.width)
    expected = torch.stack([m(x[i])[0] for i, m in enumerate(modules)])
    torch.testing.assert_close(task._recur(params, x), expected)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("normalized", [False, True])
def test_convnet_is_a_sequence_of_torch_layers(normalized: bool) -> None:
    task = find(ConvNet, lambda t: (t.normalized, t.depth, t.residual) == (normalized, 2, False))
    params = copies_of(task, 2)
    images, labels = task.batch(generator(1))
    found = task.losses(params, (images, labels))
    activation = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}[task.activation]()
    for copy in range(2):
        own = {name: value[copy] for name, value in params.items()}
        hidden = images
        for layer in range(2):
            weight, stride = own[f"weight{layer}"], 1 if layer else 2
            hidden = nn.functional.conv2d(
                hidden, weight, own.get(f"bias{layer}"), stride=stride, padding=1
            )
            if normalized:
                gain, shift = own[f"gain{layer}"], own[f"shift{layer}"]
                hidden = nn.functional.batch_norm(hidden, None, None, gain, shift, training=True)
            hidden = activation(hidden)
        features = hidden.mean((2, 3)) if task.pooled else hidden.flatten(1)
        out = nn.functional.linear(features, own["head"], own["head_bias"])
        torch.testing.assert_close(found[copy], nn.functional.cross_entropy(out, labels))


def test_derivatives_of_the_boundary_value_problem() -> None:
    """Those carried through the layers are those of torch.func."""
    task = build(BoundaryValue, 0)
    params = copies_of(task, 1)
    x = torch.rand(4, 1)
    value, first, second = task._with_derivatives(params, x)

    def solution(point: Tensor) -> Tensor:
        return task.net(params, point.view(1, 1) * task.input_scale).squeeze()

    points = x.squeeze(1)
    derivative = torch.func.grad(solution)
    expected = [torch.func.vmap(f)(points) for f in (derivative, torch.func.grad(derivative))]
    torch.testing.assert_close(value.flatten(), torch.stack([solution(p) for p in points]))
    torch.testing.assert_close(first.flatten(), expected[0])
    torch.testing.assert_close(second.flatten(), expected[1], rtol=1e-4, atol=1e-4)


# ---- the mixture


PINNED = {
    ("populations-2", 0): ("Sequences", 226, True, 3.268334),
    ("populations-2", 4): ("Teacher", 173, False, 1.353720),
    ("populations-2", 8): ("SkipGram", 205, True, 4.158883),
    ("populations-2", 24): ("BoundaryValue", 340, True, 0.609659),
    ("populations-3", 7): ("Coordinates", 465, False, 0.869676),
    ("populations-3", 15): ("MatrixFactorization", 1116, False, 0.929588),
    ("populations-3", 19): ("DeepSequences", 181, True, 3.702179),
}


def test_draws_are_pinned() -> None:
    """References and unfinished trainings are kept by seed: the order of draws must not change."""
    for (mixture, seed), expected in PINNED.items():
        run = draw(seed, NO_DATA, mixture)
        batches, _ = run_generators(seed)
        params = {name: value[None] for name, value in run.task.initial(batches).items()}
        loss = run.task.losses(params, run.task.batch(batches)).item()
        assert (run.task.name, run.steps, run.known) == expected[:3]
        assert loss == pytest.approx(expected[3], rel=1e-4)


def test_no_data_is_an_error() -> None:
    empty = DataOptions(data_dir=NO_DATA.root() / "nonesuch", download=False)
    with pytest.raises(FileNotFoundError, match="no mnist images under"):
        Classification(Sampler(generator()), empty)


# ---- runs


def run_of(steps: int = 12, known: bool = True) -> Draw:
    task = find(Quadratic, lambda t: t.kind == "random")
    return Draw(task, steps, known)


def horizon_weights(rule: UpdateRule, copies: int) -> Tensor:
    return flat(rule) + 0.2 * torch.randn(copies, len(flat(rule)), generator=generator(5))


def test_held_out_losses_are_those_before_and_after_a_run() -> None:
    rule, task = HorizonRule(), build(HeldOutTeacher, 2)
    losses, held_out = roll(rule, flat(rule).repeat(2, 1), Draw(task, 40, True), seed=1)
    assert losses.shape == (40, 2)
    start = {name: value[None] for name, value in task.initial(run_generators(1)[0]).items()}
    first = task.losses(start, task.held_out)
    assert held_out[0].tolist() == pytest.approx([first.item()] * 2, rel=1e-5)
    assert (held_out[1] < held_out[0]).all()
    assert roll(rule, flat(rule)[None], run_of(2), seed=1)[1] is None


@pytest.mark.usefixtures("either_form")
@pytest.mark.parametrize("eigenbasis", [False, True])
@pytest.mark.parametrize("total", [None, 30])
def test_copies_step_as_the_optimizer_does(total: int | None, eigenbasis: bool) -> None:
    """Each by its own weights."""
    rule = HorizonRule(HorizonConfig(hidden_size=4, eigenbasis=eigenbasis))
    weights = horizon_weights(rule, 2)
    shapes = {"w": (6, 4), "v": (6, 4), "b": (3,), "c": ()}
    initial = {name: torch.randn(shape) for name, shape in shapes.items()}
    grads = [torch.randn(30, 2, *shape) for shape in shapes.values()]
    copies = CopiesOptimizer(rule, weights, initial, total)
    for step in range(30):
        copies.step([grad[step] for grad in grads])
    for copy in range(2):
        nn.utils.vector_to_parameters(weights[copy].clone(), rule.parameters())
        params = [nn.Parameter(value.clone()) for value in initial.values()]
        optimizer = LearnedOptimizer(params, rule, total_steps=total)
        for step in range(30):
            step_with(optimizer, *(grad[step, copy] for grad in grads))
        own = [stack[copy] for stack in copies.params.values()]
        torch.testing.assert_close(own, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_adamw_is_that_of_torch(known: bool) -> None:
    run, steps = run_of(30, known), 30
    found = roll_adamw(ADAMW_LRS, run, seed=4)
    assert found.shape == (30, len(ADAMW_LRS))
    batches, _ = run_generators(4)
    param = nn.Parameter(run.task.initial(batches)["x"][None])
    optimizer = torch.optim.AdamW([param], 1e-2, weight_decay=0.01)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) if known else 1.0
        return min(1.0, (step + 1) / (0.05 * steps)) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def loss() -> Tensor:
        return run.task.losses({"x": param}, run.task.batch(batches)).sum()

    losses = descend(optimizer, steps, loss, after_step=schedule.step)
    assert found[:, ADAMW_LRS.index(1e-2)].tolist() == pytest.approx(losses, rel=1e-4)


def test_scores() -> None:
    """Logs of losses relative to the first; what diverged counts as a thousand times that."""
    losses = torch.full((100, 3), 2.0, dtype=torch.float64)
    losses[1:, 1], losses[50:, 2] = 1.0, math.nan
    final, mean = scores(losses)
    assert final.tolist() == pytest.approx([0, math.log(0.5), math.log(1000)], abs=3e-4)
    assert mean[1] < mean[0] < mean[2]
    # A rise above the first loss counts besides, at its highest and on average.
    risen = rise(losses)
    assert risen.tolist() == [0, 0, pytest.approx(math.log(1000) * (1 + 0.5 * 50 / 96), rel=0.01)]
    torch.testing.assert_close(fitness(losses, True), 0.8 * final + 0.2 * mean + risen)
    torch.testing.assert_close(fitness(losses, False), 0.5 * final + 0.5 * mean + risen)
    # A held-out loss counts for half of the final one: here it is a tenth of the first.
    held_out = torch.tensor([[2.0, 2.0, 2.0], [0.2, 0.2, math.nan]]).double()
    half = 0.5 * final + 0.5 * torch.tensor([0.1, 0.1, 1000]).double().log()
    expected = 0.8 * half + 0.2 * mean + risen
    torch.testing.assert_close(fitness(losses, True, held_out), expected, atol=1e-3, rtol=0)
