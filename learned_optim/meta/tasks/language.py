"""Character-level language models: a small GRU and transformers on a text.

The text is a file of the user's (``--text``) or, without one, what every Python carries: the
source of its standard library's ``argparse`` module, about 100 kB of English and code. A model of
3.2 million parameters reads all modules of that library, some megabytes.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import Batch, EvaluationTask, ModuleTask

LENGTH = 64
BATCH_SIZE = 16


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


def library_modules() -> list[str]:
    """The modules of Python's standard library, in the order of their names."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def next_character_task(
    text: str,
    alphabet: str,
    build: Callable[[], nn.Module],
    length: int = LENGTH,
    batch_size: int = BATCH_SIZE,
    most_tests: int | None = None,
) -> ModuleTask:
    """Next-character prediction on the first nine tenths of a text; the last tenth tests.

    Args:
        text: characters that are not in ``alphabet`` are left out.
        alphabet: the tokens, in order.
        build: makes a module from tokens ``(batch, length)`` to logits ``(batch, length,
            vocabulary)``.
        most_tests: sequences of the test; all of the last tenth if not given.
    """
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = torch.tensor([index[character] for character in text if character in index])
    train, held_out = tokens.tensor_split([len(tokens) * 9 // 10])

    def sequences(part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        chunk = part[starts[:, None] + torch.arange(length + 1)]  # (batch, length + 1)
        return chunk[:, :-1], chunk[:, 1:]

    def draw(generator: Generator) -> Batch:
        starts = torch.randint(len(train) - length, (batch_size,), generator=generator)
        return sequences(train, starts)

    def tests() -> tuple[Tensor, Tensor]:
        return sequences(held_out, torch.arange(0, len(held_out) - length, length)[:most_tests])

    return ModuleTask(build, draw, sequence_loss, tests=tests)


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
        return self.head(self.gru(self.embed(tokens))[0])


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


class Transformer(nn.Module):
    """A decoder-only transformer: logits ``(batch, length, vocabulary)``.

    Token and position embeddings have a standard deviation of 0.02. The output layer of a ``tied``
    one is its embedding table.
    """

    def __init__(
        self, vocabulary: int, width: int = 64, depth: int = 2, length: int = LENGTH,
        tied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary)
        self.output_layers = () if tied else ("head.weight",)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        x = self.norm(self.blocks(x))
        return x @ self.embed.weight.t() if self.head is None else self.head(x)


def _char_lm(model: Callable[[int], nn.Module], data: DataOptions) -> ModuleTask:
    text = text_of(data.text)
    alphabet = "".join(sorted(set(text)))
    return next_character_task(text, alphabet, partial(model, len(alphabet)))


def _gpt(data: DataOptions) -> ModuleTask:
    """Four layers of width 256 on batches of 8 x 128 characters."""
    text = "".join(library_modules()) if data.text is None else text_of(data.text)
    model = partial(Transformer, len(string.printable), width=256, depth=4, length=128)
    return next_character_task(
        text, string.printable, model, length=128, batch_size=8, most_tests=200
    )


FAMILIES = {
    "char-lm-gru": EvaluationTask(partial(_char_lm, GRUModel), steps=1500, quick=300),
    "char-lm-transformer": EvaluationTask(partial(_char_lm, Transformer)),
    "char-lm-gpt": EvaluationTask(_gpt),
    "char-lm-tied": EvaluationTask(
        partial(_char_lm, partial(Transformer, tied=True)), steps=1500, quick=300
    ),
}
