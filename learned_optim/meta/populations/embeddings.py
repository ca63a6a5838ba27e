"""Embedding tables, most of whose rows have no gradient in a step: factors and word vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population, draw_index
from learned_optim.meta.sampler import Sampler

NEGATIVES = 5
WORD_CLASSES = 8


class MatrixFactorization(Population):
    """Ratings, or whether there is one, as products of a user's and an item's factors.

    Users and items are drawn alike or by Zipf's law; biases of both and of all are optional.
    """

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        generator = draw.generator
        self.users, self.items = draw.log_integer(40, 600), draw.log_integer(40, 600)
        rank = draw.integer(2, 6)
        self.width = draw.choice([4, 8, 16, 32])
        self.batch_size = draw.log_integer(16, 256)
        self.deviation = draw.choice([0.01, 0.1, 1.0], [1, 3, 1])
        self.biased = draw.chance(0.6)
        self.user_factors = torch.randn(self.users, rank, generator=generator)
        items = torch.randn(self.items, rank, generator=generator)
        self.item_factors = items / math.sqrt(rank)
        self.noise = draw.uniform(0.05, 0.5)
        self.offset = draw.uniform(-1, 3) if draw.chance(0.3) else 0.0
        zipf = draw.chance(0.4)
        self.implicit = draw.chance(0.2)
        self.user_weights = 1 / (torch.arange(self.users).float() + 3) if zipf else None
        self.item_weights = 1 / (torch.arange(self.items).float() + 3) if zipf else None

    def init(self, generator: Generator) -> Params:
        users = torch.randn(self.users, self.width, generator=generator)
        items = torch.randn(self.items, self.width, generator=generator)
        params = {"users": users * self.deviation, "items": items * self.deviation}
        if self.biased:
            params["user_bias"] = torch.zeros(self.users, 1)
            params["item_bias"] = torch.zeros(self.items, 1)
            params["bias"] = torch.zeros(())
        return params

    def batch(self, generator: Generator) -> Batch:
        size = self.batch_size
        user = draw_index(self.user_weights, self.users, size, generator)
        item = draw_index(self.item_weights, self.items, size, generator)
        rating = (self.user_factors[user] * self.item_factors[item]).sum(1) + self.offset
        if self.implicit:
            uniform = torch.rand(size, generator=generator)
            return user, item, (uniform < torch.sigmoid(2 * rating)).float()
        return user, item, rating + self.noise * torch.randn(size, generator=generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        user, item, rating = batch  # (N,) each
        out = (params["users"][:, user] * params["items"][:, item]).sum(-1)  # (B, N)
        if self.biased:
            out = out + params["user_bias"][:, user, 0] + params["item_bias"][:, item, 0]
            out = out + params["bias"][:, None]
        if self.implicit:
            target = rating.expand_as(out)
            return F.binary_cross_entropy_with_logits(out, target, reduction="none").mean(1)
        return (out - rating).square().mean(1)


class SkipGram(Population):
    """Word vectors by skip-gram with negative samples (Mikolov et al. 2013).

    Words are drawn by Zipf's law, and neighbours mostly from the word's own class.
    """

    longest_run = 1000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        self.words = draw.log_integer(60, 800)
        self.width = draw.choice([8, 16, 32])
        self.batch_size = draw.log_integer(32, 256)
        self.deviation = draw.choice([0.02, 0.1, 1.0], [1, 1, 1])
        self.zero_output = draw.chance(0.4)
        classes = torch.randint(WORD_CLASSES, (self.words,), generator=draw.generator)
        self.frequencies = 1 / (torch.arange(self.words).float() + 2)
        same = (classes[:, None] == classes[None]).float() * 20 + 0.2
        self.neighbours = same * self.frequencies  # (words, words): weights, row by row

    def init(self, generator: Generator) -> Params:
        shape = (self.words, self.width)
        inputs = torch.randn(shape, generator=generator) * self.deviation
        if self.zero_output:
            return {"inputs": inputs, "outputs": torch.zeros(shape)}
        outputs = torch.randn(shape, generator=generator) * self.deviation
        return {"inputs": inputs, "outputs": outputs}

    def batch(self, generator: Generator) -> Batch:
        size = self.batch_size
        word = draw_index(self.frequencies, self.words, size, generator)
        neighbour = torch.multinomial(self.neighbours[word], 1, generator=generator)[:, 0]
        others = draw_index(self.frequencies, self.words, size * NEGATIVES, generator)
        others = others.view(size, NEGATIVES)
        return word, torch.cat((neighbour[:, None], others), 1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        word, candidates = batch  # (N,), (N, 1 + negatives): the first is the neighbour
        vectors = params["inputs"][:, word]
        logits = (params["outputs"][:, candidates] * vectors.unsqueeze(2)).sum(-1)
        positive, negative = F.softplus(-logits[..., 0]), F.softplus(logits[..., 1:])
        return positive.mean(1) + negative.sum(-1).mean(1)
