"""Embedding tables: matrix factorization with biases, and skip-gram word vectors.

Ratings come from hidden factors of 300 users and 400 items (Koren et al. 2009 for the model); a
batch touches a fifth of the rows. Word vectors (Mikolov et al. 2013) are trained with five
negative samples on the words of a text, as the language models read it.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import Batch, EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, draws
from learned_optim.meta.tasks.language import text_of

USERS, ITEMS, FACTORS = 300, 400, 4
RATING_NOISE = 0.3  # its square, 0.09, is the smallest loss there is
VOCABULARY, NEGATIVES, WINDOW = 1000, 5, 3
TEXT_TASKS = ("skip-gram",)


class Factorization(nn.Module):
    """Ratings ``(batch,)`` of pairs ``(batch, 2)`` of a user and an item."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        self.user_bias, self.item_bias = nn.Embedding(USERS, 1), nn.Embedding(ITEMS, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        biases = self.user_bias(user) + self.item_bias(item)
        return (self.users(user) * self.items(item)).sum(1) + biases[:, 0]


def _factorization(data: DataOptions) -> ModuleTask:
    hidden = draws(3)
    users = torch.randn(USERS, FACTORS, generator=hidden)
    items = torch.randn(ITEMS, FACTORS, generator=hidden)

    def ratings(count: int, generator: Generator) -> Batch:
        user = torch.randint(USERS, (count,), generator=generator)
        item = torch.randint(ITEMS, (count,), generator=generator)
        noise = RATING_NOISE * torch.randn(count, generator=generator)
        return torch.stack((user, item), 1), (users[user] * items[item]).sum(1) / 2 + noise

    held_out = Examples(*ratings(2000, draws(4)))
    return ModuleTask(Factorization, lambda g: ratings(64, g), F.mse_loss, tests=held_out.all)


class SkipGram(nn.Module):
    """Logits ``(batch, 1 + NEGATIVES)`` of the words beside the first of each row."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(words, width), nn.Embedding(words, width)
        nn.init.uniform_(self.words.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)  # both as in the authors' word2vec

    def forward(self, words: Tensor) -> Tensor:
        word, others = self.words(words[:, 0]), self.contexts(words[:, 1:])
        return (others @ word.unsqueeze(2)).squeeze(2)


@lru_cache(maxsize=2)
def _word_pairs(path: Path | None) -> tuple[Tensor, int]:
    """Frequency ranks ``(n, 2)`` of neighbouring words, and the number of words."""
    words = re.findall(r"[a-z]+", text_of(path).lower())
    common = [word for word, _ in Counter(words).most_common(VOCABULARY)]
    index = {word: rank for rank, word in enumerate(common)}
    ranks = torch.tensor([index[word] for word in words if word in index])
    shifts = range(1, WINDOW + 1)
    pairs = torch.cat([torch.stack((ranks[:-shift], ranks[shift:]), 1) for shift in shifts])
    return torch.cat((pairs, pairs.flip(1))), len(common)


def _skip_gram(data: DataOptions) -> ModuleTask:
    pairs, words = _word_pairs(data.text)
    train, held_out = Examples(pairs, pairs[:, 0]).split(0.1)
    # Negative samples by frequency to the power of 3/4.
    frequency = torch.bincount(train.inputs[:, 1], minlength=words).float().pow(0.75)

    def with_negatives(positive: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        count = len(positive) * NEGATIVES
        drawn = torch.multinomial(frequency, count, replacement=True, generator=generator)
        labels = torch.zeros(len(positive), 1 + NEGATIVES)
        labels[:, 0] = 1.0
        return torch.cat((positive, drawn.view(-1, NEGATIVES)), 1), labels

    positives = train.batches(256)
    return ModuleTask(
        lambda: SkipGram(words),
        lambda generator: with_negatives(positives(generator)[0], generator),
        F.binary_cross_entropy_with_logits,
        tests=lambda: with_negatives(held_out.inputs[:4000], draws(0)),
    )


FAMILIES = {
    "matrix-factorization": EvaluationTask(_factorization, steps=5000, quick=1000),
    "skip-gram": EvaluationTask(_skip_gram, steps=5000, quick=1000),
}
