"""Layers for ``B`` copies of a network at once, and how their weights begin.

Activations are ``(B, N, features)``; the first layer also takes ``(N, features)``, the same input
for every copy. Weights are ``(B, out, in)``, biases and gains ``(B, out)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions, halves, load_images

CLASSES = 10  # of the images
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
}


@lru_cache(maxsize=8)
def meta_images(data: DataOptions, side: int) -> tuple[Tensor, Tensor]:
    """The half of MNIST's training images that is for meta-training.

    Args:
        data: where the set lies; nothing is downloaded here, because many processes ask at once.
        side: 28, or 14 or 7, to which the images are averaged down.

    Returns:
        Pixels in [0, 1], float32 of shape ``(30000, 1, side, side)``, and labels, int64.
    """
    meta, _ = halves(load_images("mnist", True, DataOptions(data.data_dir, download=False)))
    pixels = meta.pixels.float() / meta.white
    if side < 28:
        pixels = F.avg_pool2d(pixels, 28 // side)
    return pixels, meta.labels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(N, in)`` or ``(B, ..., in)`` by ``(B, out, in)`` and ``(B, out)`` to ``(B, ..., out)``."""
    if x.dim() == 2:
        x = x.expand(weight.shape[0], *x.shape)
    rows, transposed = x.flatten(1, -2), weight.transpose(1, 2)
    if bias is None:
        out = torch.bmm(rows, transposed)
    else:
        out = torch.baddbmm(bias.unsqueeze(1), rows, transposed)
    return out.unflatten(1, x.shape[1:-1])


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Layer normalization over the last dimension; gain and shift broadcast with ``x``."""
    return F.layer_norm(x, (x.shape[-1],)) * gain + shift


def batch_norm(x: Tensor, gain: Tensor, shift: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Batch normalization by statistics over ``dims``; gain and shift broadcast with ``x``."""
    mean = x.mean(dims, keepdim=True)
    variance = x.var(dims, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * gain + shift


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """Multi-head attention over the third dimension of ``(B, N, length, features)``."""
    query, key, value = (
        x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (query, key, value)
    )
    found = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return found.transpose(-2, -3).flatten(-2)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of every copy, ``(B,)``, with label smoothing.

    Logits are ``(B, ..., classes)``, targets int64 of shape ``(...)``, shared by the copies.
    """
    copies = logits.shape[0]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(1, -1).expand(copies, -1).reshape(-1),
        reduction="none",
        label_smoothing=smoothing,
    )
    return losses.view(copies, -1).mean(1)


def init_weight(shape: Sequence[int], kind: str, generator: Generator) -> Tensor:
    """A weight of one copy, ``(out, in, ...)``.

    Args:
        kind: ``torch`` (the default of PyTorch's layers), ``he`` (He et al. 2015), ``xavier``
            (Glorot and Bengio 2010), ``small`` (standard deviation .02), ``tiny`` (.001) or
            ``zero``.
    """
    fan_in = max(1, math.prod(shape[1:]))
    normal = torch.randn(shape, generator=generator)
    if kind == "torch":
        # The normal draw above belongs to the sequence of draws that a seed stands for.
        return _symmetric(shape, generator) / math.sqrt(fan_in)
    if kind == "zero":
        return torch.zeros(shape)
    deviation = {
        "he": math.sqrt(2 / fan_in),
        "xavier": math.sqrt(2 / (fan_in + shape[0])),
        "small": 0.02,
        "tiny": 1e-3,
    }
    return normal * deviation[kind]


def init_bias(size: int, fan_in: int, kind: str, generator: Generator) -> Tensor:
    """A bias of one copy: PyTorch's uniform one for ``torch``, otherwise zero."""
    if kind == "torch":
        return _symmetric((size,), generator) / math.sqrt(fan_in)
    return torch.zeros(size)


def _symmetric(shape: Sequence[int], generator: Generator) -> Tensor:
    """Uniform on [-1, 1)."""
    return torch.rand(shape, generator=generator) * 2 - 1
