"""Trainings on which the shipped optimizers once failed, each held against Adam or a fixed bound.

A case that still fails is a strict expected failure, so that a checkpoint that mends it is noticed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim import LearnedOptimizer
from learned_optim.meta.tasks.coordinates import sine_network
from learned_optim.meta.tasks.finetuning import with_adapters

pytestmark = pytest.mark.slow

CHECKPOINT = "default"

unsolved = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="the default fits a hundred examples closer than AdamW at 1e-3",
)

# Cases by name that fail; strict, so that a checkpoint that mends one is noticed.
UNSOLVED = {
    "test_low_rank_adapters[unknown length]",
}

Make = Callable[[Sequence[Tensor], int], Optimizer]


@pytest.fixture(params=["unknown length", "known length"])
def learned(request: pytest.FixtureRequest) -> Make:
    """The default optimizer, told the length of the run or not."""
    if request.node.name in UNSOLVED:
        request.applymarker(unsolved)

    def make(params: Sequence[Tensor], steps: int) -> Optimizer:
        told = steps if request.param == "known length" else None
        return LearnedOptimizer(params, CHECKPOINT, total_steps=told)

    return make


def adam(params: Sequence[Tensor], steps: int) -> Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def adamw(params: Sequence[Tensor], steps: int) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in a fixed order: ``(1797, 64)`` in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.data / 16, dtype=torch.float32)
    return images[order], torch.tensor(found.target)[order]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train; returns the loss before each step."""
    losses = []
    for _ in range(steps):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step()
    return losses


def drawn(inputs: Tensor, targets: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(inputs), (size,), generator=generator)
        yield inputs[index], targets[index]


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return (model(inputs).argmax(1) == targets).float().mean().item()


# ---- a transformer from scratch, without warm-up


class RowTransformer(nn.Module):
    """torch's own encoder on digits, whose eight rows are the tokens after a class token."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 64), nn.Linear(64, 10)
        self.token = nn.Parameter(torch.zeros(1, 1, 64))
        self.place = nn.Parameter(0.02 * torch.randn(1, 9, 64))
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.view(-1, 8, 8))
        tokens = torch.cat((self.token.expand(len(x), -1, -1), rows), 1)
        return self.head(self.body(tokens + self.place)[:, 0])


@lru_cache(maxsize=2)
def trained_transformer(norm_first: bool, make: Make) -> tuple[float, float]:
    """Largest loss and held-out accuracy of 150 steps."""
    inputs, targets = digits()
    torch.manual_seed(0)
    model = RowTransformer(norm_first)
    optimizer = make(list(model.parameters()), 150)
    losses = fit(model, optimizer, drawn(inputs[:1400], targets[:1400], 32, seed=0), 150)
    return max(losses), accuracy(model, inputs[1400:], targets[1400:])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_transformer_from_scratch(norm_first: bool, learned: Make) -> None:
    """At least Adam's held-out accuracy, and no loss above 1.2 times its largest."""
    theirs = trained_transformer(norm_first, adam)
    ours = trained_transformer.__wrapped__(norm_first, learned)
    assert ours[1] >= theirs[1]
    assert ours[0] <= 1.2 * theirs[0]


# ---- going on from trained weights


@lru_cache(maxsize=1)
def _trained_perceptron() -> nn.Module:
    inputs, targets = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    fit(
        model,
        adamw(list(model.parameters()), 600),
        drawn(inputs[:1200], targets[:1200], 64, 1),
        600,
    )
    return model


def trained_perceptron() -> nn.Module:
    return copy.deepcopy(_trained_perceptron())


def test_further_training_keeps_what_is_known(learned: Make) -> None:
    """The same data again: after no step is the accuracy more than .03 below the start's."""
    inputs, targets = digits()
    model = trained_perceptron()
    start, seen = accuracy(model, inputs[1200:], targets[1200:]), []
    fit(
        model,
        learned(list(model.parameters()), 100),
        drawn(inputs[:1200], targets[:1200], 64, seed=2),
        100,
        after_step=lambda: seen.append(accuracy(model, inputs[1200:], targets[1200:])),
    )
    assert min(seen) >= start - 0.03


def test_thawed_layers_keep_what_is_known(learned: Make) -> None:
    """A new head on a frozen trunk, which then thaws in the same optimizer."""
    inputs, targets = digits()
    model = trained_perceptron()
    torch.manual_seed(3)
    model[4] = nn.Linear(128, 10)
    trunk = [*model[0].parameters(), *model[2].parameters()]
    optimizer = learned(list(model.parameters()), 200)
    for param in trunk:
        param.requires_grad_(False)
    fit(model, optimizer, drawn(inputs[:1200], targets[:1200], 64, seed=4), 100)
    start, seen = accuracy(model, inputs[1200:], targets[1200:]), []
    for param in trunk:
        param.requires_grad_(True)
    fit(
        model,
        optimizer,
        drawn(inputs[:1200], targets[:1200], 64, seed=5),
        100,
        after_step=lambda: seen.append(accuracy(model, inputs[1200:], targets[1200:])),
    )
    assert min(seen) >= start - 0.03


def test_low_rank_adapters(learned: Make) -> None:
    """A hundred examples of a shifted task: never 1.1 times the first loss, and AdamW's last."""
    inputs, targets = digits()
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))
    shifted = 0.6 * inputs + 0.2 + 0.1 * noise
    curves = {}
    for make in (adamw, learned):
        torch.manual_seed(3)
        model, seen = with_adapters(trained_perceptron()), []

        def held_out(model: nn.Module = model, seen: list[float] = seen) -> None:
            with torch.no_grad():
                seen.append(F.cross_entropy(model(shifted[1200:]), targets[1200:]).item())

        held_out()
        optimizer = make(list(model.parameters()), 100)
        batches = drawn(shifted[:100], targets[:100], 32, seed=2)
        fit(model, optimizer, batches, 100, after_step=held_out)
        curves[make] = seen
    assert max(curves[learned]) <= 1.1 * curves[learned][0]
    assert curves[learned][-1] <= curves[adamw][-1]


# ---- layers and tables of unusual scale


def test_output_layer_that_starts_at_zero(learned: Make) -> None:
    """A denoiser of digits: no loss above 1.5 times the first."""
    inputs = 2.0 * digits()[0] - 1.0
    torch.manual_seed(0)
    head = nn.Linear(256, 64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    hidden = (nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU())
    model = nn.Sequential(*hidden, head)

    def noisy() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            clean = inputs[torch.randint(len(inputs), (64,), generator=generator)]
            share = torch.rand(64, 1, generator=generator)
            noise = torch.randn(64, 64, generator=generator)
            mixed = (1.0 - share).sqrt() * clean + share.sqrt() * noise
            yield torch.cat((mixed, share), 1), noise

    losses = fit(model, learned(list(model.parameters()), 300), noisy(), 300, F.mse_loss)
    assert max(losses) <= 1.5 * losses[0]


def test_embedding_tables_and_biases(learned: Make) -> None:
    """Matrix factorization, of whose rows a batch touches a fifth: below .3; the noise is .09."""
    generator = torch.Generator().manual_seed(3)
    users, items = (
        torch.randn(300, 4, generator=generator),
        torch.randn(400, 4, generator=generator),
    )
    torch.manual_seed(0)
    tables = [nn.Embedding(rows, width) for rows, width in ((300, 8), (400, 8), (300, 1), (400, 1))]
    for table in tables:
        nn.init.normal_(table.weight, std=0.1 if table.embedding_dim > 1 else 0.0)
    optimizer = learned([table.weight for table in tables], 2500)
    losses = []
    for _ in range(2500):
        i = torch.randint(300, (64,), generator=generator)
        j = torch.randint(400, (64,), generator=generator)
        noise = 0.3 * torch.randn(64, generator=generator)
        rating = (users[i] * items[j]).sum(1) / 2 + noise
        u, v, user_bias, item_bias = (
            table(k) for table, k in zip(tables, (i, j, i, j), strict=True)
        )
        predicted = (u * v).sum(1) + user_bias[:, 0] + item_bias[:, 0]
        loss = F.mse_loss(predicted, rating)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-500:]) / 500 < 0.3


def test_sine_network(learned: Make) -> None:
    """Sine activations fit a signal of one dimension: below .01. Large steps never come back."""
    torch.manual_seed(0)
    model = sine_network(inputs=1, outputs=1, width=48)

    def signal() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.rand(256, 1) * 2 - 1
            yield x, torch.sin(9 * x) * torch.cos(31 * x) + 0.5 * torch.sin(70 * x)

    optimizer = learned(list(model.parameters()), 1000)
    losses = fit(model, optimizer, signal(), 1000, F.mse_loss)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-250:]) / 250 < 0.01
