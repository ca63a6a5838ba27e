"""A mixture of small and varied optimizees, of which every sample is a task of its own.

Two thirds classify images of MNIST's meta-training half, at several resolutions and under random
transformations, by perceptrons and convolutional networks of random size, activation and
initialization. The others are synthetic: quadratics, random teachers, and sequences from random
Markov chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import Images, halves, load_images
from learned_optim.meta.sampler import Sampler
from learned_optim.meta.tasks._base import Batch, ModuleTask, Params, Task, TaskFamily, TaskOptions
from learned_optim.meta.tasks.images import THESIS_STD, mlp
from learned_optim.meta.tasks.language import Block, sequence_loss
from learned_optim.meta.tasks.quadratic import Quadratics


def _size(sampler: Sampler, low: int, high: int) -> int:
    """Log-uniform over ``low`` to ``high``, both included."""
    return round(sampler.log_uniform(low, high))


def _batch_size(sampler: Sampler) -> int:
    return sampler.choice([128, 64, 32, 16, 256], [6, 2, 1, 1, 1])


def _initialization(sampler: Sampler) -> float | None:
    """The thesis's tiny weights, other normal ones, or the module's own (``None``)."""
    other = sampler.log_uniform(0.003, 0.1)
    return sampler.choice([THESIS_STD, other, None], [5, 2, 6])


def _mlp(sampler: Sampler, inputs: int, outputs: int, widest: int) -> Callable[[], nn.Module]:
    depth = sampler.choice([1, 2, 3, 5, 0], [5, 3, 1, 0.5, 0.5])
    widths = [_size(sampler, 8, widest) for _ in range(depth)]
    activations = [nn.Sigmoid, nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU]
    activation = sampler.choice(activations, [4, 4, 2, 1, 1])
    # Batch statistics only: running ones would be state outside the task's pure functions.
    batch_norm = partial(nn.BatchNorm1d, track_running_stats=False)
    norm = sampler.choice([None, nn.LayerNorm, batch_norm], [8, 1, 1])
    gain = sampler.choice([None, 1.0, math.sqrt(2.0)], [6, 1, 1])  # Xavier's, He's

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        size = inputs
        for width in widths:
            layers.append(nn.Linear(size, width))
            if norm is not None:
                layers.append(norm(width))
            layers.append(activation())
            size = width
        network = nn.Sequential(*layers, nn.Linear(size, outputs))
        for param in network.parameters():
            if gain is not None and param.dim() > 1:
                nn.init.normal_(param, std=gain / math.sqrt(param.shape[1]))
        return network

    return build


def _convnet(sampler: Sampler, channels: int, side: int, outputs: int) -> Callable[[], nn.Module]:
    first, second = _size(sampler, 4, 12), _size(sampler, 6, 20)
    activation = sampler.choice([nn.ReLU, nn.GELU, nn.Tanh], [3, 1, 1])
    norm = sampler.chance(0.35)
    pool = sampler.chance(0.5)

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


def _quadratic(sampler: Sampler) -> Task:
    return Quadratics().sample(sampler.generator)


class IllConditioned(Task):
    """f(theta) = sum_i lambda_i (R (theta - theta*))_i^2, eigenvalues over up to three decades."""

    def __init__(self, sampler: Sampler) -> None:
        n = _size(sampler, 4, 64)
        decades = sampler.uniform(0.0, 3.0)
        eigenvalues = 10.0 ** (-decades * torch.rand(n, generator=sampler.generator))
        rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=sampler.generator))
        if sampler.chance(0.5):
            rotation = torch.eye(n)
        self.root = eigenvalues.sqrt()[:, None] * rotation
        self.target = sampler.log_uniform(0.1, 3.0) * torch.randn(n, generator=sampler.generator)
        self.noise = sampler.uniform(0.0, 0.5) if sampler.chance(0.3) else 0.0

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.zeros_like(self.target)}

    def batch(self, generator: Generator) -> Batch:
        jitter = self.noise * torch.randn(self.target.shape, generator=generator)
        return self.root, self.target + jitter

    def loss(self, params: Params, batch: Batch) -> Tensor:
        root, target = batch
        return (root @ (params["theta"] - target)).square().sum()


def _teacher(sampler: Sampler) -> Task:
    """Regression on, or classification by, a random network."""
    inputs, hidden = _size(sampler, 4, 64), _size(sampler, 4, 64)
    outputs = _size(sampler, 1, 10)
    first = torch.randn(hidden, inputs, generator=sampler.generator) / math.sqrt(inputs)
    second = torch.randn(outputs, hidden, generator=sampler.generator) * 1.5 / math.sqrt(hidden)
    linear, noise = sampler.chance(0.3), sampler.uniform(0.0, 0.3)
    spread = sampler.log_uniform(0.3, 3.0) ** torch.randn(inputs, generator=sampler.generator)
    classify, size = outputs > 1 and sampler.chance(0.4), _batch_size(sampler)

    def draw(generator: Generator) -> Batch:
        x = torch.randn(size, inputs, generator=generator)
        h = x @ first.t()
        y = (h if linear else torch.tanh(2.0 * h)) @ second.t()
        if classify:
            return x * spread, (3.0 * y).argmax(-1)
        return x * spread, y + noise * torch.randn(y.shape, generator=generator)

    criterion = F.cross_entropy if classify else F.mse_loss
    build = _mlp(sampler, inputs, outputs, 100)
    return ModuleTask(build, draw, criterion, init_std=_initialization(sampler))


class SequenceNet(nn.Module):
    """Next-token logits ``(batch, length, vocabulary)`` from a GRU or one attention block."""

    def __init__(self, vocabulary: int, width: int, length: int, attention: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = attention
        if attention:
            self.place = nn.Parameter(0.02 * torch.randn(length, width))
            self.block = Block(width, heads=1)
        else:
            self.reset_update = nn.Linear(2 * width, 2 * width)
            self.candidate = nn.Linear(2 * width, width)
        self.norm_out = nn.LayerNorm(width) if attention else nn.Identity()
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.block(x + self.place) if self.attention else self._recur(x)
        return self.head(self.norm_out(x))

    def _recur(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        states = []
        for now in x.unbind(1):
            r, z = self.reset_update(torch.cat((now, h), -1)).sigmoid().chunk(2, -1)
            h = z * h + (1 - z) * self.candidate(torch.cat((now, r * h), -1)).tanh()
            states.append(h)
        return torch.stack(states, 1)


def _sequence(sampler: Sampler) -> Task:
    """Next-token prediction on a random second-order Markov chain."""
    vocabulary, width, length = _size(sampler, 6, 24), _size(sampler, 12, 32), _size(sampler, 6, 12)
    attention, size = sampler.chance(0.5), sampler.choice([16, 32], [1, 1])
    logits = 2.5 * torch.randn(vocabulary, vocabulary, vocabulary, generator=sampler.generator)
    table = logits.softmax(-1)

    def draw(generator: Generator) -> Batch:
        tokens = [torch.randint(vocabulary, (size,), generator=generator) for _ in range(2)]
        for _ in range(length - 1):
            rows = table[tokens[-2], tokens[-1]]
            tokens.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
        sequence = torch.stack(tokens, 1)  # (size, length + 1)
        return sequence[:, :-1], sequence[:, 1:]

    def build() -> nn.Module:
        return SequenceNet(vocabulary, width, length, attention)

    return ModuleTask(build, draw, sequence_loss)


class SmallTasks(TaskFamily):
    """The mixture. Its members differ in structure and cannot be stacked."""

    stackable = False
    data_sets = ("mnist",)

    def __init__(self, images: Images) -> None:
        self.pixels: dict[int, Tensor] = {}  # side -> uint8 (N, side, side)
        whole = images.pixels.float()
        for side, kernel in ((28, 1), (14, 2), (7, 4)):
            pooled = F.avg_pool2d(whole, kernel) if kernel > 1 else whole
            self.pixels[side] = pooled.round().to(torch.uint8).squeeze(1)
        self.labels = images.labels

    def sample(self, generator: Generator) -> Task:
        sampler = Sampler(generator)
        kinds: list[Callable[[Sampler], Task]] = [
            self._image_task, _quadratic, IllConditioned, _teacher, _sequence,
        ]  # fmt: skip
        return sampler.choice(kinds, [66, 7, 6, 12, 9])(sampler)

    def _image_task(self, sampler: Sampler) -> Task:
        if sampler.chance(0.3):
            return self._plain(sampler)
        conv = sampler.chance(0.2)
        side = (
            sampler.choice([7, 14, 28], [3, 3, 2]) if not conv else sampler.choice([7, 14], [2, 1])
        )
        colours = 3 if side < 28 and sampler.chance(0.25) else 1
        views = sampler.choice([1, 2, 3], [6, 1, 1])
        draw = self._batches(sampler, side, colours, views)
        classes = 10 * views
        if conv:
            build = _convnet(sampler, colours, side, classes)
            init = sampler.choice([0.01, None], [1, 8])
        else:
            build = _mlp(sampler, colours * side * side, classes, 32 if side == 28 else 100)
            init = _initialization(sampler)
        return ModuleTask(build, draw, init_std=init)

    def _plain(self, sampler: Sampler) -> Task:
        """A perceptron of the thesis's kind: whole images as they are, tiny or usual weights."""
        widths = [_size(sampler, 12, 64)] * sampler.choice([1, 2], [3, 1])
        activation = sampler.choice([nn.Sigmoid, nn.ReLU], [3, 2])
        pixels, labels = self.pixels[28], self.labels
        size = sampler.choice([128, 64, 32], [6, 1, 1])

        def build() -> nn.Module:
            return mlp(28 * 28, tuple(widths), 10, activation)

        def draw(generator: Generator) -> Batch:
            index = torch.randint(len(labels), (size,), generator=generator)
            return pixels[index].float().div_(255.0).unsqueeze(1), labels[index]

        return ModuleTask(build, draw, init_std=sampler.choice([THESIS_STD, None], [3, 2]))

    def _batches(
        self, sampler: Sampler, side: int, colours: int, views: int
    ) -> Callable[[Generator], Batch]:
        """Batches under one fixed random transformation.

        With ``views`` > 1, each image is shown as it is, flipped or transposed, and the view
        becomes part of the class: 20 or 30 classes.
        """
        pixels, labels, size = self.pixels[side], self.labels, _batch_size(sampler)
        invert = sampler.chance(0.15)
        noise = sampler.uniform(0.0, 0.6) if sampler.chance(0.25) else 0.0
        wrong = sampler.uniform(0.0, 0.4) if sampler.chance(0.15) else 0.0
        standardize = sampler.chance(0.3)
        mean, std = 0.13, 0.28  # roughly those of all pixels, at any resolution
        tint = torch.tensor([sampler.uniform(0.2, 1.0) for _ in range(colours)]).view(-1, 1, 1)
        ground = torch.tensor([sampler.uniform(0.0, 0.5) for _ in range(colours)]).view(-1, 1, 1)
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


def _small_tasks(options: TaskOptions) -> TaskFamily:
    meta, evaluation = halves(load_images("mnist", True, options.data))
    return SmallTasks(meta if options.split == "meta" else evaluation)


FAMILIES = {"small-tasks": _small_tasks}
