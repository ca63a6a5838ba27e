"""A mixture of small, cheap and varied optimizees, of which every sample is a task of its own.

Images of MNIST's meta-training half at several resolutions and
under random transformations, on perceptrons and convolutional networks of random size, activation
and initialization; and synthetic problems: quadratics, regression on random teachers, mixtures of
Gaussians, and sequences from random Markov chains. No other data set is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import Images, halves, load_images
from learned_optim.meta.tasks._base import Batch, ModuleTask, Params, Task, TaskFamily, TaskOptions
from learned_optim.meta.tasks.images import THESIS_STD, mlp
from learned_optim.meta.tasks.quadratic import Quadratic

T = TypeVar("T")


class Dice:
    """Readable draws from a generator."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """Log-uniform over ``low`` to ``high``, both included."""
        return round(self.log_uniform(low, high))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def choice(self, options: Sequence[tuple[float, T]]) -> T:
        """One of the options, by weight."""
        weights = torch.tensor([float(weight) for weight, _ in options])
        return options[int(torch.multinomial(weights, 1, generator=self.generator))][1]

    def seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))


def _activation(dice: Dice) -> type[nn.Module]:
    return dice.choice([(4, nn.Sigmoid), (4, nn.ReLU), (2, nn.Tanh), (1, nn.GELU), (1, nn.SiLU)])


def _batch_size(dice: Dice) -> int:
    return dice.choice([(6, 128), (2, 64), (1, 32), (1, 16), (1, 256)])


def _initialization(dice: Dice) -> float | None:
    """The thesis's tiny weights, other normal ones, or the module's own (``None``)."""
    other = dice.log_uniform(0.003, 0.1)
    return dice.choice([(5, THESIS_STD), (2, other), (6, None)])


class ScaledInit(nn.Module):
    """A module whose weight matrices are drawn from He's or Xavier's distribution."""

    def __init__(self, body: nn.Module, gain: float) -> None:
        super().__init__()
        self.body = body
        for param in body.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=gain / math.sqrt(math.prod(param.shape[1:])))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _mlp(dice: Dice, inputs: int, outputs: int, widest: int) -> Callable[[], nn.Module]:
    depth = dice.choice([(5, 1), (3, 2), (1, 3), (0.5, 5), (0.5, 0)])
    widths = [dice.integer(8, widest) for _ in range(depth)]
    activation = _activation(dice)
    norm = dice.choice([(8, None), (1, nn.LayerNorm), (1, _batch_norm)])
    gain = dice.choice([(6, None), (1, 1.0), (1, math.sqrt(2.0))])

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        size = inputs
        for width in widths:
            layers.append(nn.Linear(size, width))
            if norm is not None:
                layers.append(norm(width))
            layers.append(activation())
            size = width
        body = nn.Sequential(*layers, nn.Linear(size, outputs))
        return body if gain is None else ScaledInit(body, gain)

    return build


def _batch_norm(width: int) -> nn.Module:
    # Batch statistics only: running ones would be state outside the task's pure functions.
    return nn.BatchNorm1d(width, track_running_stats=False)


def _convnet(dice: Dice, channels: int, side: int, outputs: int) -> Callable[[], nn.Module]:
    first, second = dice.integer(4, 12), dice.integer(6, 20)
    activation = dice.choice([(3, nn.ReLU), (1, nn.GELU), (1, nn.Tanh)])
    norm = dice.chance(0.35)
    pool = dice.chance(0.5)

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        size, planes = side, channels
        for width in (first, second):
            layers.append(nn.Conv2d(planes, width, 3, stride=1 if pool else 2, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(width, track_running_stats=False))
            layers.append(activation())
            if pool:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size, planes = (size + 1) // 2, width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(planes * size * size, outputs))

    return build


class ImageTasks:
    """Random classification tasks on one set of images."""

    def __init__(self, images: Images) -> None:
        self.pixels: dict[int, Tensor] = {}  # side -> uint8 (N, side, side)
        whole = images.pixels.float()
        for side, kernel in ((28, 1), (14, 2), (7, 4)):
            pooled = F.avg_pool2d(whole, kernel) if kernel > 1 else whole
            self.pixels[side] = pooled.round().to(torch.uint8).squeeze(1)
        self.labels = images.labels

    def sample(self, dice: Dice) -> Task:
        if dice.chance(0.3):
            return self._plain(dice)
        conv = dice.chance(0.2)
        side = (
            dice.choice([(3, 7), (3, 14), (2, 28)]) if not conv else dice.choice([(2, 7), (1, 14)])
        )
        colours = 3 if side < 28 and dice.chance(0.25) else 1
        views = dice.choice([(6, 1), (1, 2), (1, 3)])
        draw = self._batches(dice, side, colours, views)
        classes = 10 * views
        if conv:
            build = _convnet(dice, colours, side, classes)
            init = dice.choice([(1, 0.01), (8, None)])
        else:
            build = _mlp(dice, colours * side * side, classes, 32 if side == 28 else 100)
            init = _initialization(dice)
        return ModuleTask(build, draw, init_std=init)

    def _plain(self, dice: Dice) -> Task:
        """A perceptron of the thesis's kind: whole images as they are, tiny or usual weights."""
        widths = [dice.integer(12, 64)] * dice.choice([(3, 1), (1, 2)])
        activation = dice.choice([(3, nn.Sigmoid), (2, nn.ReLU)])
        pixels, labels = self.pixels[28], self.labels
        size = dice.choice([(6, 128), (1, 64), (1, 32)])

        def build() -> nn.Module:
            return mlp(28 * 28, tuple(widths), 10, activation)

        def draw(generator: Generator) -> Batch:
            index = torch.randint(len(labels), (size,), generator=generator)
            return pixels[index].float().div_(255.0).unsqueeze(1), labels[index]

        return ModuleTask(build, draw, init_std=dice.choice([(3, THESIS_STD), (2, None)]))

    def _batches(
        self, dice: Dice, side: int, colours: int, views: int
    ) -> Callable[[Generator], Batch]:
        """Batches under one fixed random transformation.

        With ``views`` > 1, each image is shown as it is, flipped or transposed, and the view
        becomes part of the class: 20 or 30 classes.
        """
        pixels, labels, size = self.pixels[side], self.labels, _batch_size(dice)
        invert = dice.chance(0.15)
        noise = dice.uniform(0.0, 0.6) if dice.chance(0.25) else 0.0
        wrong = dice.uniform(0.0, 0.4) if dice.chance(0.15) else 0.0
        standardize = dice.chance(0.3)
        mean, std = 0.13, 0.28  # roughly those of all pixels, at any resolution
        tint = torch.tensor([dice.uniform(0.2, 1.0) for _ in range(colours)]).view(-1, 1, 1)
        ground = torch.tensor([dice.uniform(0.0, 0.5) for _ in range(colours)]).view(-1, 1, 1)
        if colours == 1:
            ground.zero_()

        def draw(generator: Generator) -> Batch:
            index = torch.randint(len(labels), (size,), generator=generator)
            x, y = pixels[index].float().div_(255.0), labels[index]
            if views > 1:
                view = torch.randint(views, (size,), generator=generator)
                x = torch.where((view == 1)[:, None, None], x.flip(-1), x)
                x = torch.where((view == 2)[:, None, None], x.transpose(-1, -2), x)
                y = y + 10 * view
            if invert:
                x = 1.0 - x
            x = ground + (tint - ground) * x.unsqueeze(1)  # (size, colours, side, side)
            if noise:
                x = x + noise * torch.randn(x.shape, generator=generator)
            if standardize:
                x = (x - mean) / std
            if wrong:
                random = torch.randint(10 * views, (size,), generator=generator)
                y = torch.where(torch.rand(size, generator=generator) < wrong, random, y)
            return x, y

        return draw


class IllConditioned(Task):
    """f(theta) = sum_i lambda_i (R (theta - theta*))_i^2, eigenvalues over up to three decades."""

    def __init__(self, dice: Dice) -> None:
        n = dice.integer(4, 64)
        decades = dice.uniform(0.0, 3.0)
        eigenvalues = 10.0 ** (-decades * torch.rand(n, generator=dice.generator))
        rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=dice.generator))
        if dice.chance(0.5):
            rotation = torch.eye(n)
        self.root = eigenvalues.sqrt()[:, None] * rotation
        self.target = dice.log_uniform(0.1, 3.0) * torch.randn(n, generator=dice.generator)
        self.noise = dice.uniform(0.0, 0.5) if dice.chance(0.3) else 0.0

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.zeros_like(self.target)}

    def batch(self, generator: Generator) -> Batch:
        jitter = self.noise * torch.randn(self.target.shape, generator=generator)
        return self.root, self.target + jitter

    def loss(self, params: Params, batch: Batch) -> Tensor:
        root, target = batch
        return (root @ (params["theta"] - target)).square().sum()


def _teacher(dice: Dice) -> Task:
    """Regression on, or classification by, a random network."""
    inputs, hidden = dice.integer(4, 64), dice.integer(4, 64)
    outputs = dice.integer(1, 10)
    first = torch.randn(hidden, inputs, generator=dice.generator) / math.sqrt(inputs)
    second = torch.randn(outputs, hidden, generator=dice.generator) * 1.5 / math.sqrt(hidden)
    linear, noise = dice.chance(0.3), dice.uniform(0.0, 0.3)
    spread = dice.log_uniform(0.3, 3.0) ** torch.randn(inputs, generator=dice.generator)
    classify, size = outputs > 1 and dice.chance(0.4), _batch_size(dice)

    def draw(generator: Generator) -> Batch:
        x = torch.randn(size, inputs, generator=generator)
        h = x @ first.t()
        y = (h if linear else torch.tanh(2.0 * h)) @ second.t()
        if classify:
            return x * spread, (3.0 * y).argmax(-1)
        return x * spread, y + noise * torch.randn(y.shape, generator=generator)

    criterion = F.cross_entropy if classify else F.mse_loss
    build = _mlp(dice, inputs, outputs, 100)
    return ModuleTask(build, draw, criterion, init_std=_initialization(dice))


class SequenceNet(nn.Module):
    """Next-token logits ``(batch, length, vocabulary)`` from a GRU or one attention block."""

    def __init__(self, vocabulary: int, width: int, length: int, attention: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = attention
        if attention:
            self.place = nn.Parameter(0.02 * torch.randn(length, width))
            self.norm_in, self.norm_mid = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        else:
            self.reset_update = nn.Linear(2 * width, 2 * width)
            self.candidate = nn.Linear(2 * width, width)
        self.norm_out = nn.LayerNorm(width) if attention else nn.Identity()
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self._attend(x) if self.attention else self._recur(x)
        return self.head(self.norm_out(x))

    def _attend(self, x: Tensor) -> Tensor:
        x = x + self.place
        q, k, v = self.qkv(self.norm_in(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        x = x + self.out(scores.masked_fill(future, -1e9).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))

    def _recur(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        states = []
        for now in x.unbind(1):
            r, z = self.reset_update(torch.cat((now, h), -1)).sigmoid().chunk(2, -1)
            h = z * h + (1 - z) * self.candidate(torch.cat((now, r * h), -1)).tanh()
            states.append(h)
        return torch.stack(states, 1)


def _sequence(dice: Dice) -> Task:
    """Next-token prediction on a random second-order Markov chain."""
    vocabulary, width, length = dice.integer(6, 24), dice.integer(12, 32), dice.integer(6, 12)
    attention, size = dice.chance(0.5), dice.choice([(1, 16), (1, 32)])
    logits = 2.5 * torch.randn(vocabulary, vocabulary, vocabulary, generator=dice.generator)
    table = logits.softmax(-1)

    def draw(generator: Generator) -> Batch:
        tokens = [torch.randint(vocabulary, (size,), generator=generator) for _ in range(2)]
        for _ in range(length - 1):
            rows = table[tokens[-2], tokens[-1]]
            tokens.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
        sequence = torch.stack(tokens, 1)  # (size, length + 1)
        return sequence[:, :-1], sequence[:, 1:]

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    return ModuleTask(lambda: SequenceNet(vocabulary, width, length, attention), draw, criterion)


def _thesis_quadratic(dice: Dice) -> Task:
    w = torch.randn(10, 10, generator=dice.generator)
    return Quadratic(w, torch.randn(10, generator=dice.generator))


class SmallTasks(TaskFamily):
    """The mixture. Its members differ in structure and cannot be stacked."""

    stackable = False
    data_sets = ("mnist",)

    def __init__(self, images: Images) -> None:
        self._images = ImageTasks(images)

    def sample(self, generator: Generator) -> Task:
        dice = Dice(generator)
        kinds: list[tuple[float, Callable[[Dice], Task]]] = [
            (66, self._images.sample),
            (7, _thesis_quadratic),
            (6, IllConditioned),
            (12, _teacher),
            (9, _sequence),
        ]
        return dice.choice(kinds)(dice)


def _small_tasks(options: TaskOptions) -> TaskFamily:
    meta, evaluation = halves(load_images("mnist", True, options.data))
    return SmallTasks(meta if options.split == "meta" else evaluation)


FAMILIES = {"small-tasks": _small_tasks}
