"""Tabular regression and classification: random teachers with badly scaled columns and noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population
from learned_optim.meta.populations._layers import cross_entropy
from learned_optim.meta.populations._perceptron import draw_perceptron
from learned_optim.meta.sampler import Sampler

TEACHER_UNITS = 32


class Teacher(Population):
    """Perceptrons on a random teacher's rows.

    The teacher is a tanh network, sometimes with a sine of one column added; the student sees the
    columns in units of their own, over up to several orders of magnitude. Noise may be heavy-tailed
    (a normal by the root of a uniform), targets shifted and scaled, the loss Huber's. Targets of
    some tasks drift: they turn towards a sine of the first column, once around in 2 pi ``drift``
    steps.
    """

    longest_run = 3000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        generator = draw.generator
        columns = draw.log_integer(2, 64)
        self.classifies = draw.chance(0.4)
        outputs = draw.integer(2, 8) if self.classifies else draw.choice([1, 1, 4])
        count = draw.log_integer(200, 8000)
        spread = draw.choice([0, 1, 2], [3, 2, 1])
        rows = torch.randn(count, columns, generator=generator)
        units = torch.exp(torch.randn(columns, generator=generator) * spread * 0.7)
        if draw.chance(0.2):
            rows = rows.sign() * rows.abs() ** 2
        answers = _teach(draw, rows, outputs)  # (rows, outputs), standardized
        self.examples = rows * units
        self.heavy_noise = draw.chance(0.15)
        noise = draw.choice([0, 0.1, 0.5], [3, 3, 1])
        error = torch.randn(answers.shape, generator=generator)
        if self.classifies:
            self.targets = (answers + noise * error).argmax(1)
        else:
            if self.heavy_noise:
                uniform = torch.rand(answers.shape, generator=generator)
                error = error / uniform.clamp(min=0.02).sqrt()
            scale = 1.0 if draw.chance(0.7) else draw.log_uniform(0.1, 10)
            offset = 0.0 if draw.chance(0.8) else draw.uniform(-3, 3)
            self.targets = (answers + noise * error) * scale + offset
        self.batch_size = draw.batch_size(4, 512)
        self.net = draw_perceptron(draw, columns, outputs)
        if self.net.norm == "batch":
            self.batch_size = max(self.batch_size, 16)
        self.huber = draw.chance(0.15)
        drifts = not self.classifies and draw.chance(0.12)
        self.drift = draw.log_uniform(30, 1000) if drifts else 0.0
        if self.drift:
            wave = self.examples[:, :1].sin()
            self.other_targets = wave * self.targets.std() * torch.ones(1, outputs)
        self.reset()

    def reset(self) -> None:
        self._step = 0

    def batch(self, generator: Generator) -> Batch:
        index = torch.randint(len(self.examples), (self.batch_size,), generator=generator)
        targets = self.targets[index]
        if self.drift:
            angle = self._step / self.drift
            targets = targets * math.cos(angle) + self.other_targets[index] * math.sin(angle)
            self._step += 1
        return self.examples[index], targets, self.net.masks(self.batch_size, generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        rows, targets, masks = batch
        out = self.net(params, rows, masks)
        if self.classifies:
            return cross_entropy(out, targets)
        error = out - targets
        if self.huber:
            losses = F.huber_loss(error, torch.zeros_like(error), reduction="none")
        else:
            losses = error.square()
        return losses.mean((1, 2))


class HeldOutTeacher(Teacher):
    """Teachers with a third of the rows held out, and targets that do not drift."""

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        super().__init__(draw, data)
        self.drift, count = 0.0, len(self.examples) // 3
        self.held_out = self.examples[:count], self.targets[:count], None
        self.examples, self.targets = self.examples[count:], self.targets[count:]


def _teach(draw: Sampler, rows: Tensor, outputs: int) -> Tensor:
    """A random teacher's answers ``(rows, outputs)``, each of mean 0 and deviation 1."""
    generator, columns = draw.generator, rows.shape[1]
    first = torch.randn(columns, TEACHER_UNITS, generator=generator) / math.sqrt(columns)
    second = torch.randn(TEACHER_UNITS, outputs, generator=generator) / math.sqrt(TEACHER_UNITS)
    answers = torch.tanh(rows @ first * draw.uniform(0.5, 3)) @ second * 2
    if draw.chance(0.4):
        answers = answers + torch.sin(2 * rows[:, :1] * draw.uniform(0.5, 2))
    return (answers - answers.mean(0)) / (answers.std(0) + 1e-6)
