"""Trainings on which the shipped optimizers once failed, each held against Adam or a fixed bound.

A case that still fails is a strict expected failure, so that a checkpoint that mends it is noticed.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat.common import descend
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_optim import LearnedOptimizer
from learned_optim.meta import build_tasks
from learned_optim.meta.tasks._examples import noised
from learned_optim.meta.tasks.coordinates import sine_network
from learned_optim.meta.tasks.finetuning import with_adapters
from learned_optim.meta.tasks.generative import denoising_network

pytestmark = pytest.mark.slow

CHECKPOINT = "default"

# Cases by name that fail, and why; strict, so that a checkpoint that mends one is noticed.
UNSOLVED = {
    "test_low_rank_adapters[known length-1.0]": "fits 100 examples closer than AdamW at 1e-3",
    "test_low_rank_adapters[unknown length-1.0]": "fits 100 examples closer than AdamW at 1e-3",
}

Make = Callable[..., Optimizer]  # of parameters and the number of steps


@pytest.fixture(params=["unknown length", "known length"])
def learned(request: pytest.FixtureRequest) -> Make:
    """The default optimizer, told the length of the run or not."""
    if (reason := UNSOLVED.get(request.node.name)) is not None:
        mark = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
        request.applymarker(mark)

    def make(params: Sequence[Any], steps: int, lr: float = 1.0) -> Optimizer:
        told = steps if request.param == "known length" else None
        return LearnedOptimizer(params, CHECKPOINT, lr=lr, total_steps=told)

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


def supervised(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Callable[[], Tensor]:
    """The loss of the next batch."""

    def loss() -> Tensor:
        inputs, targets = next(batches)
        return criterion(model(inputs), targets)

    return loss


def fit(
    model: nn.Module,
    make: Make,
    steps: int,
    batches: Iterator[tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """:func:`descend` on :func:`supervised` with an optimizer of the model's parameters."""
    optimizer = make(list(model.parameters()), steps)
    return descend(optimizer, steps, supervised(model, batches, criterion), after_step)


def drawn(inputs: Tensor, targets: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(inputs), (size,), generator=generator)
        yield inputs[index], targets[index]


def drawn_digits(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of the first ``count`` digits."""
    inputs, targets = digits()
    return drawn(inputs[:count], targets[:count], size, seed)


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
    losses = fit(model, make, 150, drawn_digits(1400, 32, seed=0))
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
def trained_perceptron() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    fit(model, adamw, 600, drawn_digits(1200, 64, seed=1))
    return model


def accuracy_lost(model: nn.Module, optimizer: Optimizer, seed: int) -> float:
    """Largest fall of the held-out accuracy in 100 steps on the data of the trained weights."""
    held_out = [part[1200:] for part in digits()]
    start, seen = accuracy(model, *held_out), []
    loss = supervised(model, drawn_digits(1200, 64, seed))
    descend(optimizer, 100, loss, lambda: seen.append(accuracy(model, *held_out)))
    return start - min(seen)


def test_further_training_keeps_what_is_known(learned: Make) -> None:
    """The same data again: after no step is the accuracy more than .03 below the start's."""
    model = copy.deepcopy(trained_perceptron())
    assert accuracy_lost(model, learned(list(model.parameters()), 100), seed=2) <= 0.03


def test_thawed_layers_keep_what_is_known(learned: Make) -> None:
    """A new head on a frozen trunk, which then thaws in the same optimizer."""
    model = copy.deepcopy(trained_perceptron())
    torch.manual_seed(3)
    model[4] = nn.Linear(128, 10)
    optimizer = learned(list(model.parameters()), 200)
    model[:4].requires_grad_(False)
    descend(optimizer, 100, supervised(model, drawn_digits(1200, 64, seed=4)))
    model.requires_grad_(True)
    assert accuracy_lost(model, optimizer, seed=5) <= 0.03


@pytest.mark.parametrize("lr", [1.0, 0.1])
def test_low_rank_adapters(learned: Make, lr: float) -> None:
    """A hundred examples of a shifted task: never 1.1 times the first loss, and AdamW's last."""
    inputs, targets = digits()
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))
    shifted = 0.6 * inputs + 0.2 + 0.1 * noise
    curves = {}
    scaled = partial(learned, lr=lr)
    for make in (adamw, scaled):
        torch.manual_seed(3)
        model, seen = with_adapters(trained_perceptron()), []

        @torch.no_grad()
        def held_out(model: nn.Module = model, seen: list[float] = seen) -> None:
            seen.append(F.cross_entropy(model(shifted[1200:]), targets[1200:]).item())

        held_out()
        fit(model, make, 100, drawn(shifted[:100], targets[:100], 32, seed=2), after_step=held_out)
        curves[make] = seen
    assert max(curves[scaled]) <= 1.1 * curves[scaled][0]
    assert curves[scaled][-1] <= curves[adamw][-1]


# ---- layers and tables of unusual scale


def test_output_layer_that_starts_at_zero(learned: Make) -> None:
    """A denoiser of digits: no loss above 1.5 times the first."""
    inputs = 2.0 * digits()[0] - 1.0
    torch.manual_seed(0)
    model = denoising_network(width=256)

    def noisy() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            clean = inputs[torch.randint(len(inputs), (64,), generator=generator)]
            yield noised(clean, generator)

    losses = fit(model, learned, 300, noisy(), F.mse_loss)
    assert max(losses) <= 1.5 * losses[0]


def test_embedding_tables_and_biases(learned: Make) -> None:
    """Matrix factorization, of whose rows a batch touches a fifth: below .3; the noise is .09."""
    generator = torch.Generator().manual_seed(3)
    task = build_tasks("matrix-factorization").sample(generator)
    tables = {name: table.requires_grad_() for name, table in task.init(generator).items()}
    optimizer = learned(list(tables.values()), 2500)
    losses = descend(optimizer, 2500, lambda: task.loss(tables, task.batch(generator)))
    assert sum(losses[-500:]) / 500 < 0.3


def test_sine_network(learned: Make) -> None:
    """Sine activations fit a signal of one dimension: below .01. Large steps never come back."""
    torch.manual_seed(0)
    model = sine_network(inputs=1, outputs=1, width=48)

    def signal() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.rand(256, 1) * 2 - 1
            yield x, torch.sin(9 * x) * torch.cos(31 * x) + 0.5 * torch.sin(70 * x)

    losses = fit(model, learned, 1000, signal(), F.mse_loss)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-250:]) / 250 < 0.01


class WordModel(nn.Module):
    """The next of 1,000 words from the last one; the readout starts at zero."""

    def __init__(self, words: int = 1000, width: int = 48) -> None:
        super().__init__()
        self.table, self.readout = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.zeros_(self.readout.weight)
        self.hidden = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.table(x)
        inner = inner + self.hidden(inner)
        return self.readout(F.layer_norm(inner, inner.shape[-1:]))


def test_readout_that_starts_at_zero(learned: Make) -> None:
    """At most 4.21, the held-out loss of AdamW at 3e-3 with a cosine; uniform is 6.91."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1000, 16, generator=generator) for _ in range(2))
    chances = (0.8 * left @ right.t()).softmax(1)
    torch.manual_seed(0)
    model = WordModel()

    def words() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randint(1000, (256,), generator=generator)
            yield x, torch.multinomial(chances[x], 1, generator=generator)[:, 0]

    fit(model, learned, 400, words())
    with torch.no_grad():
        scores = model(torch.arange(1000)).log_softmax(1)
    assert float(-(chances * scores).sum(1).mean()) <= 4.21


# ---- depth without normalization


def in_hes(layer: nn.Linear | nn.Conv2d) -> list[nn.Module]:
    """A layer in He's initialization, and a ReLU."""
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return [layer, nn.ReLU()]


def deep_perceptron(depth: int, width: int, activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(64, width), activation()]
    for _ in range(depth):
        layers += [in_hes(nn.Linear(width, width))[0], activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def plain_convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(12):
        layers += in_hes(nn.Conv2d(16 if index else 1, 16, 3, padding=1))
        layers += [nn.MaxPool2d(2)] if index in (1, 5) else []
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("build", "size", "steps", "bound"),
    [
        (partial(deep_perceptron, 20, 64, nn.ReLU), 32, 200, 1.5),
        (partial(deep_perceptron, 24, 48, nn.GELU), 32, 300, 2.0),
        (plain_convolutions, 16, 100, 1.0),
    ],
)
def test_deep_plain_networks_live(
    build: Callable[[], nn.Module], size: int, steps: int, bound: float, learned: Make
) -> None:
    """20 or 24 layers, 12 convolutions: neither of two seeds stays at chance, ln 10 = 2.30."""
    for seed in range(2):
        torch.manual_seed(seed)
        model = build()
        losses = fit(model, learned, steps, drawn_digits(1400, size, seed + 1))
        assert sum(losses[-10:]) / 10 < bound, seed


# ---- several objectives


def test_tasks_in_turn_on_one_trunk(learned: Make) -> None:
    """Four heads take turns: each ends at most at AdamW's held-out loss at its best rate, 1e-2."""
    inputs, targets = digits()
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))[targets]

    def held_out(make: Callable[[list[nn.Parameter]], Optimizer], anneal: bool) -> list[float]:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        heads = nn.ModuleList(nn.Linear(64, width) for width in (10, 2, 64, 10))

        def loss(task: int, index: Tensor) -> Tensor:
            out = heads[task](trunk(inputs[index]))
            if task == 2:
                return F.mse_loss(out, inputs[index])
            return F.cross_entropy(out, (targets, targets % 2, targets, shuffled)[task][index])

        optimizer = make([*trunk.parameters(), *heads.parameters()])
        after_step = CosineAnnealingLR(optimizer, 400).step if anneal else lambda: None
        generator, turns = torch.Generator().manual_seed(0), itertools.cycle(range(4))

        def objective() -> Tensor:
            return loss(next(turns), torch.randint(1200, (32,), generator=generator))

        descend(optimizer, 400, objective, after_step)
        with torch.no_grad():
            return [loss(task, torch.arange(1200, 1797)).item() for task in range(4)]

    ours = held_out(lambda params: learned(params, 400), anneal=False)
    theirs = held_out(lambda params: torch.optim.AdamW(params, lr=1e-2), anneal=True)
    assert all(a <= 1.15 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_codebook_beside_an_encoder(learned: Make) -> None:
    """A vector-quantized autoencoder: reconstruction below AdamW's .033, all codes in use."""
    inputs, _ = digits()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    decoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    codebook = nn.Embedding(32, 8)
    nn.init.uniform_(codebook.weight, -1 / 32, 1 / 32)
    model = nn.ModuleList((encoder, decoder, codebook))

    def quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = encoder(x).view(-1, 4, 8)
        index = torch.cdist(codes, codebook.weight[None]).argmin(2)
        return codes, codebook(index), index

    generator = torch.Generator().manual_seed(0)

    def objective() -> Tensor:
        x = inputs[torch.randint(1200, (64,), generator=generator)]
        codes, near, _ = quantized(x)
        passed = codes + (near - codes).detach()  # gradients go straight through
        loss = F.mse_loss(decoder(passed.flatten(1)), x) + F.mse_loss(near, codes.detach())
        return loss + 0.25 * F.mse_loss(codes, near.detach())

    descend(learned(list(model.parameters()), 600), 600, objective)
    with torch.no_grad():
        _, near, index = quantized(inputs[1200:])
        assert F.mse_loss(decoder(near.flatten(1)), inputs[1200:]) < 0.025
    assert len(index.unique()) >= 24


def test_temperature_holds_its_entropy(learned: Make) -> None:
    """A bandit's temperature, one number trained against its policy: entropy .8 within .06."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    log_temperature = nn.Parameter(torch.zeros(1))
    rewards = torch.randn(8, 6, generator=generator)
    gaps = []

    def objective() -> Tensor:
        x = torch.randn(64, 8, generator=generator)
        log = policy(x).log_softmax(1)
        entropy = -(log.exp() * log).sum(1).mean()
        gain = (log.exp() * (x @ rewards)).sum(1).mean()
        gaps.append(abs(entropy.item() - 0.8))
        loss = -gain - log_temperature.exp().detach()[0] * entropy
        return loss + log_temperature[0] * (entropy.detach() - 0.8)

    descend(learned([*policy.parameters(), log_temperature], 500), 500, objective)
    assert sum(gaps[-50:]) / 50 <= 0.06


# ---- objectives that are nearly met


def test_preferences_leave_the_rest(learned: Make) -> None:
    """Odd digits shall answer one more; even digits, not in the data, keep .97 of theirs.

    The rate is that of the documentation: steps do not shrink with a loss that is nearly zero.
    """
    inputs, targets = digits()
    reference, policy = (copy.deepcopy(trained_perceptron()) for _ in range(2))
    reference.requires_grad_(False)
    odd = (targets[:1200] % 2 == 1).nonzero()[:, 0]
    even = 1200 + (targets[1200:] % 2 == 0).nonzero()[:, 0]
    start = accuracy(policy, inputs[even], targets[even])
    chosen = (targets + 1) % 10

    def preference(scores: Tensor, index: Tensor) -> Tensor:
        gain = scores.log_softmax(1) - reference(inputs[index]).log_softmax(1)
        rows = torch.arange(len(index))
        margin = gain[rows, chosen[index]] - gain[rows, targets[index]]
        return -F.logsigmoid(0.1 * margin).mean()

    generator = torch.Generator().manual_seed(0)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            index = odd[torch.randint(len(odd), (16,), generator=generator)]
            yield inputs[index], index

    losses = fit(policy, partial(learned, lr=0.015), 200, pairs(), preference)
    assert sum(losses[-10:]) / 10 < 0.33
    assert accuracy(policy, inputs[even], targets[even]) >= 0.97 * start
    with torch.no_grad():
        old, new = (net(inputs[even]).log_softmax(1) for net in (reference, policy))
        assert (old.exp() * (old - new)).sum(1).mean() < 0.33


def test_multiplier_holds_its_constraint(learned: Make) -> None:
    """A Lagrange multiplier in a group that maximizes: violated by at most .005 in the end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 10, generator=generator)
    noise = 0.3 * torch.randn(500, generator=generator)
    member, y = (x[:, 0] > 0).float(), ((x[:, 0] + x[:, 1] + noise) > 0).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
    multiplier = nn.Parameter(torch.zeros(1))
    groups = [
        {"params": list(model.parameters())},
        {"params": [multiplier], "maximize": True, "weight_decay": 0.0},
    ]
    violations = []

    def objective() -> Tensor:
        logits = model(x)[:, 0]
        share = logits.sigmoid()
        inside, outside = (share * member).sum(), (share * (1 - member)).sum()
        gap = inside / member.sum() - outside / (1 - member).sum()
        violation = gap.abs() - 0.05
        violations.append(violation.item())
        return F.binary_cross_entropy_with_logits(logits, y) + multiplier[0] * violation

    clamp = torch.no_grad()(lambda: multiplier.clamp_(min=0))
    descend(learned(groups, 1000), 1000, objective, after_step=clamp)
    assert abs(violations[-1]) <= 0.005


# ---- a run that is resumed for longer


@pytest.mark.filterwarnings("ignore:total_steps=.*is kept:UserWarning")
def test_a_run_resumed_for_longer_goes_on_at_full_rate() -> None:
    """100 steps, resumed for 1,000: within a factor of two of 1,000 in one go."""
    inputs, targets = digits()

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def train(model: nn.Module, optimizer: Optimizer, steps: int) -> float:
        descend(optimizer, steps, supervised(model, drawn_digits(1400, 32, seed=1)))
        with torch.no_grad():
            return F.cross_entropy(model(inputs[:1400]), targets[:1400]).item()

    whole, model = network(), network()
    at_once = train(whole, LearnedOptimizer(whole.parameters(), total_steps=1000), 1000)
    first = LearnedOptimizer(model.parameters(), total_steps=100)
    before = train(model, first, 100)
    resumed = LearnedOptimizer(model.parameters(), total_steps=1000)
    resumed.load_state_dict(first.state_dict())
    assert train(model, resumed, 900) <= min(2.0 * at_once, 0.02 * before)
