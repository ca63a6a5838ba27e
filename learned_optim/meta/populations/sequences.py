"""Sequence models: transformers and recurrent networks on a random grammar, and on image rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions
from learned_optim.meta.populations._base import Batch, Params, Population, UnusableTaskError
from learned_optim.meta.populations._layers import (
    CLASSES,
    attention,
    cross_entropy,
    init_weight,
    layer_norm,
    linear,
    meta_images,
)
from learned_optim.meta.sampler import Sampler

# Texts of the grammar and their length.
TEXTS, TEXT_LENGTH = 64, 80


class Sequences(Population):
    """Next-token prediction on a random second-order grammar, or classification of image rows.

    ``attention`` and ``rows`` are transformers, normalized before or after each block; ``rows``
    reads an image as a sequence of rows with a class token before it. ``gru`` and ``rnn`` are one
    recurrent layer. Output and input embedding may be the same tensor.
    """

    longest_run = 500

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        self.kind = draw.choice(["attention", "gru", "rnn", "rows"], [5, 1.2, 0.8, 3])
        shares = [0.3, 1, 2, 2, 2, 1] if draw.large else [3, 2, 2, 1, 0.7, 0.3]
        self.width = draw.choice([16, 24, 32, 48, 64, 96], shares)
        self.depth = draw.choice([1, 2, 3], [4, 2, 0.6])
        self.heads = draw.choice([2, 4])
        self.length = draw.integer(8, 16)
        self.batch_size = draw.batch_size(4, 32 if draw.large else 16)
        self.tokens = draw.integer(12, 48)
        self.post_norm = draw.chance(0.4)
        self.tied = draw.chance(0.6)
        self.deviation = draw.choice([0.02, 0.1, 1.0], [4, 1, 0 if self.tied else 1])
        self.expansion = draw.choice([2, 4])
        self.init_kind = draw.choice(["torch", "small", "xavier"], [3, 2, 2])
        self.is_transformer = self.kind in ("attention", "rows")
        if self.kind == "rows":
            self.side = draw.choice([7, 14])
            images, self.labels = meta_images(data, self.side)
            self.images = images[:, 0]  # (examples, side, side)
            self.length = self.side + 1
            self.post_norm = draw.chance(0.5)
        else:
            self.text = _grammar_text(draw, self.tokens)

    @property
    def rows(self) -> int:
        return self.batch_size * self.length

    # ---- parameters

    def init(self, generator: Generator) -> Params:
        width, params = self.width, Params()
        if self.kind == "rows":
            params["embedding"] = init_weight((width, self.side), "torch", generator)
            params["embedding_bias"] = torch.zeros(width)
            params["class_token"] = torch.zeros(1, width)
            params["position"] = 0.02 * torch.randn(self.length, width, generator=generator)
        else:
            table = torch.randn(self.tokens, width, generator=generator)
            params["embedding"] = table * self.deviation
            if self.kind == "attention":
                shape = (self.length, width)
                params["position"] = (
                    torch.zeros(shape)
                    if self.deviation == 0.1
                    else 0.02 * torch.randn(shape, generator=generator)
                )
        if self.is_transformer:
            for layer in range(self.depth):
                params |= self._init_block(f"{layer}.", generator)
            if not self.post_norm:
                params["norm.gain"], params["norm.shift"] = torch.ones(width), torch.zeros(width)
        else:
            gates = (3 if self.kind == "gru" else 1) * width
            params["input"] = init_weight((gates, width), "torch", generator)
            params["recurrent"] = init_weight((gates, width), "torch", generator)
            params["input_bias"] = torch.zeros(gates)
            params["recurrent_bias"] = torch.zeros(gates)
        if self.kind == "rows" or not self.tied:
            outputs = CLASSES if self.kind == "rows" else self.tokens
            params["head"] = init_weight((outputs, width), "torch", generator)
            params["head_bias"] = torch.zeros(outputs)
        return params

    def _init_block(self, prefix: str, generator: Generator) -> Params:
        width, inner, params = self.width, self.expansion * self.width, Params()
        shapes = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (inner, width),
            "down": (width, inner),
        }
        for name, shape in shapes.items():
            params[f"{prefix}{name}"] = init_weight(shape, self.init_kind, generator)
            params[f"{prefix}{name}_bias"] = torch.zeros(shape[0])
        for name in ("attention", "mlp"):
            params[f"{prefix}{name}.gain"] = torch.ones(width)
            params[f"{prefix}{name}.shift"] = torch.zeros(width)
        return params

    # ---- batches and losses

    def batch(self, generator: Generator) -> Batch:
        if self.kind == "rows":
            index = torch.randint(len(self.images), (2 * self.batch_size,), generator=generator)
            return self.images[index], self.labels[index]
        last = len(self.text) - self.length - 1
        start = torch.randint(last, (self.batch_size,), generator=generator)
        tokens = self.text[start[:, None] + torch.arange(self.length + 1)]
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        inputs, targets = batch
        hidden = self._embed(params, inputs)  # (B, N, length, width)
        if self.is_transformer:
            for layer in range(self.depth):
                hidden = self._block(params, hidden, f"{layer}.")
            if not self.post_norm:
                hidden = _norm(params, hidden, "norm")
        else:
            hidden = self._recur(params, hidden)
        if self.kind == "rows":
            hidden = hidden[:, :, 0]  # at the class token
        weight = params.get("head", params["embedding"])  # tied models have no head
        return cross_entropy(linear(hidden, weight, params.get("head_bias")), targets)

    def _embed(self, params: Params, inputs: Tensor) -> Tensor:
        if self.kind != "rows":
            hidden = params["embedding"][:, inputs]
            return hidden + params["position"][:, None] if self.kind == "attention" else hidden
        count = inputs.shape[0]  # images, (N, side, side)
        embedded = linear(inputs.flatten(0, 1), params["embedding"], params["embedding_bias"])
        token = params["class_token"][:, None]
        token = token.expand(token.shape[0], count, 1, self.width)
        hidden = torch.cat((token, embedded.unflatten(1, inputs.shape[:2])), 2)
        return hidden + params["position"][:, None]

    def _block(self, params: Params, hidden: Tensor, prefix: str) -> Tensor:
        def dense(x: Tensor, name: str) -> Tensor:
            return linear(x, params[f"{prefix}{name}"], params[f"{prefix}{name}_bias"])

        def attend(x: Tensor) -> Tensor:
            query, key, value = dense(x, "qkv").chunk(3, -1)
            causal = self.kind == "attention"
            return dense(attention(query, key, value, self.heads, causal), "out")

        def mlp(x: Tensor) -> Tensor:
            return dense(F.gelu(dense(x, "up")), "down")

        for part, name in ((attend, "attention"), (mlp, "mlp")):
            if self.post_norm:
                hidden = _norm(params, hidden + part(hidden), f"{prefix}{name}")
            else:
                hidden = hidden + part(_norm(params, hidden, f"{prefix}{name}"))
        return hidden

    def _recur(self, params: Params, hidden: Tensor) -> Tensor:
        copies, count = hidden.shape[:2]
        state = torch.zeros(copies, count, self.width)
        inputs = linear(hidden, params["input"], params["input_bias"])
        states = []
        for step in range(self.length):
            fresh = inputs[:, :, step]
            recurrent = linear(state, params["recurrent"], params["recurrent_bias"])
            if self.kind == "rnn":
                state = torch.tanh(fresh + recurrent)
            else:
                reset, update, new = fresh.chunk(3, -1)
                reset_r, update_r, new_r = recurrent.chunk(3, -1)
                reset = torch.sigmoid(reset + reset_r)
                update = torch.sigmoid(update + update_r)
                new = torch.tanh(new + reset * new_r)
                state = (1 - update) * new + update * state
            states.append(state)
        return torch.stack(states, 2)


class DeepSequences(Sequences):
    """Sequences with 3 to 8 transformer blocks, in longer runs."""

    longest_run = 1000

    def __init__(self, draw: Sampler, data: DataOptions) -> None:
        super().__init__(draw, data)
        if not self.is_transformer:
            raise UnusableTaskError("a recurrent network has one layer")
        self.width = draw.choice([32, 48, 64, 96], [3, 3, 2, 0.5])
        self.depth = draw.choice([3, 4, 6, 8], [3, 3, 2, 0.5])
        self.batch_size = min(self.batch_size, 8)


def _norm(params: Params, x: Tensor, name: str) -> Tensor:
    """Layer normalization of ``(B, N, length, width)`` by ``(B, width)``."""
    gain, shift = (params[f"{name}.{part}"][:, None, None] for part in ("gain", "shift"))
    return layer_norm(x, gain, shift)


def _grammar_text(draw: Sampler, tokens: int) -> Tensor:
    """Texts of a random grammar one behind the other, int64 of shape ``(5120,)``.

    The next token depends on the last one, or on the last two, and some tokens are frequent.
    """
    generator = draw.generator
    concentration = draw.uniform(0.5, 2.5)
    first_order = draw.chance(0.5)
    shape = (tokens, 1 if first_order else tokens, tokens)
    logits = concentration * torch.randn(shape, generator=generator)
    logits = logits.expand(tokens, tokens, tokens).transpose(0, 1)
    logits = logits + torch.randn(tokens, generator=generator)
    table = torch.softmax(logits, -1)  # probabilities after the last two tokens
    before = torch.randint(tokens, (TEXTS,), generator=generator)
    last = torch.randint(tokens, (TEXTS,), generator=generator)
    columns = []
    for _ in range(TEXT_LENGTH):
        following = torch.multinomial(table[before, last], 1, generator=generator)[:, 0]
        columns.append(following)
        before, last = last, following
    return torch.stack(columns, 1).flatten()
