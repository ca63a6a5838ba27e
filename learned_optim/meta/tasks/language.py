"""Character-level language models: a small GRU and small transformers on a text.

The text is a file of the user's (``--text``) or, without one, what every Python carries: the
source of its standard library's ``argparse`` module, about 100 kB of English and code.
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
    Horizon,
    ModuleTask,
    TaskFamily,
    TaskOptions,
    evaluation_only,
)

LENGTH = 64
BATCH_SIZE = 16

GRU_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def text_of(path: Path | None) -> str:
    """The text to model: a file's, or else that of Python's ``argparse``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is shorter than ten sequences.
    """
    path = Path(argparse.__file__) if path is None else path
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}: --text names the one to model")
    text = path.read_text(encoding="utf-8", errors="replace")
    if len(text) < 10 * (LENGTH + 1):
        raise ValueError(
            f"{path} has {len(text)} characters; at least {10 * (LENGTH + 1)} are needed"
        )
    return text


def encoded(text: str, alphabet: str | list[str]) -> Tensor:
    """Indices into ``alphabet``, int64 of shape ``(N,)``; other characters are left out."""
    index = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([index[character] for character in text if character in index])


@lru_cache(maxsize=2)
def read_text(path: Path | None) -> tuple[Tensor, int]:
    """:func:`text_of` as character indices, and the number of different characters."""
    text = text_of(path)
    alphabet = sorted(set(text))
    return encoded(text, alphabet), len(alphabet)


def sequences(text: Tensor, starts: Tensor, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both ``(len(starts), length)``, from the characters at ``starts``."""
    chunk = text[starts[:, None] + torch.arange(length + 1)]  # (batch, length + 1)
    return chunk[:, :-1], chunk[:, 1:]


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per character of logits ``(batch, length, vocabulary)``."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


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
    """A pre-norm transformer block (Radford et al. 2019), with causal attention or without."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (batch, heads, length, size)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
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


class TiedTransformer(nn.Module):
    """A decoder-only transformer whose output layer is its embedding table, of deviation 0.02."""

    output_layers = ()  # none of its own

    def __init__(
        self, vocabulary: int, width: int = 64, depth: int = 2, heads: int = 4, length: int = LENGTH
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.embed.weight.t()


def char_lm(model: Callable[[int], nn.Module], options: TaskOptions) -> TaskFamily:
    """Next-character prediction on the first nine tenths of a text; the last tenth tests."""
    evaluation_only("char-lm", options)
    tokens, vocabulary = read_text(options.data.text)
    cut = len(tokens) * 9 // 10
    train, held_out = tokens[:cut], tokens[cut:]

    def draw(generator: Generator) -> Batch:
        starts = torch.randint(len(train) - LENGTH, (BATCH_SIZE,), generator=generator)
        return sequences(train, starts)

    def tests() -> tuple[Tensor, Tensor]:
        return sequences(held_out, torch.arange(0, len(held_out) - LENGTH, LENGTH))

    task = ModuleTask(partial(model, vocabulary), draw, sequence_loss, tests=tests)
    return FixedTask(task)


FAMILIES = {
    "char-lm-gru": partial(char_lm, GRUModel),
    "char-lm-transformer": partial(char_lm, TransformerModel),
    "char-lm-tied": partial(char_lm, TiedTransformer),
}
FIELD = {"char-lm-gru": Horizon(1500, 300), "char-lm-tied": Horizon(1500, 300)}
