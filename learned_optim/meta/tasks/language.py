"""Character-level language models: a small GRU and a small transformer on a text.

The text is a file of the user's (``--text``) or, without one, what every Python carries: the source
of its standard library's ``argparse`` module, about 100 kB of English and code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    ModuleTask,
    TaskFamily,
    TaskOptions,
    evaluation_only,
)

LENGTH = 64
BATCH_SIZE = 16

GRU_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@lru_cache(maxsize=2)
def read_text(path: Path | None) -> tuple[Tensor, int]:
    """A text as character indices, int64 of shape ``(N,)``, and the number of characters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is shorter than a sequence.
    """
    path = Path(argparse.__file__) if path is None else path
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}: --text names the one to model")
    text = path.read_text(encoding="utf-8", errors="replace")
    alphabet = sorted(set(text))
    if len(text) < 10 * (LENGTH + 1):
        raise ValueError(
            f"{path} has {len(text)} characters; at least {10 * (LENGTH + 1)} are needed"
        )
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text]), len(alphabet)


class GRUModel(nn.Module):
    """Embedding, one GRU layer, linear: logits ``(batch, length, vocabulary)``."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        # nn.GRU caches its weights and would miss functional_call's: the functional form does not.
        gru = self.gru
        weights: list[Tensor] = [getattr(gru, f"{name}_l0") for name in GRU_WEIGHTS]
        x = self.embed(tokens)
        start = x.new_zeros(1, len(tokens), gru.hidden_size)
        states, _ = torch.gru(x, start, weights, True, 1, 0.0, self.training, False, True)
        return self.head(states)


class Block(nn.Module):
    """A pre-norm transformer block with causal attention (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (batch, heads, length, size)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class TransformerModel(nn.Module):
    """Two blocks of width 64 over token and position embeddings of standard deviation 0.02."""

    def __init__(self, vocabulary: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def char_lm(model: Callable[[int], nn.Module], options: TaskOptions) -> TaskFamily:
    """Next-character prediction on the first nine tenths of a text; the last tenth tests."""
    evaluation_only("char-lm", options)
    tokens, vocabulary = read_text(options.data.text)
    cut = len(tokens) * 9 // 10
    train, held_out = tokens[:cut], tokens[cut:]
    window = torch.arange(LENGTH + 1)

    def sequences(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        chunk = text[starts[:, None] + window]  # (batch, LENGTH + 1)
        return chunk[:, :-1], chunk[:, 1:]

    def draw(generator: Generator) -> Batch:
        starts = torch.randint(len(train) - LENGTH, (BATCH_SIZE,), generator=generator)
        return sequences(train, starts)

    def tests() -> tuple[Tensor, Tensor]:
        return sequences(held_out, torch.arange(0, len(held_out) - LENGTH, LENGTH))

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    build = partial(model, vocabulary)
    task = ModuleTask(build, draw, criterion, tests=tests)
    return FixedTask(task)


FAMILIES = {
    "char-lm-gru": partial(char_lm, GRUModel),
    "char-lm-transformer": partial(char_lm, TransformerModel),
}
