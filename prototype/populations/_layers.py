"""Layers for ``B`` copies of a network at once, and perceptrons made of them.

Activations are ``(B, N, features)``; the first layer also takes ``(N, features)``, the same input for
every copy. Weights are ``(B, out, in)``, biases and gains ``(B, out)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learned_optim.meta.data import DataOptions, halves, load_images
from learned_optim.meta.populations._base import Params, Sampler

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
    """``(N, in)`` or ``(B, N, in)`` by ``(B, out, in)`` and ``(B, out)`` to ``(B, N, out)``."""
    if x.dim() == 2:
        x = x.expand(weight.shape[0], *x.shape)
    transposed = weight.transpose(1, 2)
    if bias is None:
        return torch.bmm(x, transposed)
    return torch.baddbmm(bias.unsqueeze(1), x, transposed)


def linear_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` over any dimensions between: ``(B, ..., in)`` to ``(B, ..., out)``."""
    return linear(x.flatten(1, -2), weight, bias).unflatten(1, x.shape[1:-1])


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Layer normalization over the last dimension of ``(B, ..., features)``."""
    shape = (gain.shape[0],) + (1,) * (x.dim() - 2) + (gain.shape[-1],)
    return F.layer_norm(x, (x.shape[-1],)) * gain.view(shape) + shift.view(shape)


def batch_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Batch normalization of ``(B, N, features)`` by each copy's own batch statistics."""
    mean = x.mean(1, keepdim=True)
    variance = x.var(1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * gain.unsqueeze(1) + shift.unsqueeze(1)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of every copy.

    Args:
        logits: ``(B, ..., classes)``.
        target: int64 of shape ``(...)``, shared by the copies.
        smoothing: label smoothing.

    Returns:
        Shape ``(B,)``.
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
            (Glorot and Bengio 2010), ``small`` (standard deviation .02), ``tiny`` (.001) or ``zero``.
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


class Perceptron:
    """A multilayer perceptron for ``B`` copies at once.

    Args:
        inputs, outputs: features of both ends.
        hidden: widths of the hidden layers.
        activation: a key of :data:`ACTIVATIONS`.
        init: how weights begin, see :func:`init_weight`.
        norm: ``none``, ``layer`` or ``batch``, before every activation.
        residual: add a hidden layer's input to its output where their shapes are the same.
        output_init: how the last layer begins, if otherwise.
        dropout: share of hidden units left out, by masks that :meth:`masks` draws.
        prefix: what the names of its parameters begin with.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int],
        activation: str,
        init: str,
        norm: str = "none",
        residual: bool = False,
        output_init: str | None = None,
        dropout: float = 0.0,
        prefix: str = "",
    ) -> None:
        self.sizes = [inputs, *hidden, outputs]
        self.activation, self.init_kind, self.norm = activation, init, norm
        self.residual, self.output_init = residual, output_init or init
        self.dropout, self.prefix = dropout, prefix
        self.layers = len(self.sizes) - 1

    def __str__(self) -> str:
        return f"{self.sizes} {self.activation} {self.init_kind} norm={self.norm}"

    def init(self, generator: Generator) -> Params:
        """Initial parameters: ``weight``, ``bias`` and, if normalized, ``gain`` and ``shift``."""
        params: Params = {}
        for layer in range(self.layers):
            fan_in, size = self.sizes[layer : layer + 2]
            last = layer == self.layers - 1
            kind = self.output_init if last else self.init_kind
            params[f"{self.prefix}weight{layer}"] = init_weight((size, fan_in), kind, generator)
            params[f"{self.prefix}bias{layer}"] = init_bias(size, fan_in, kind, generator)
            if self.norm != "none" and not last:
                params[f"{self.prefix}gain{layer}"] = torch.ones(size)
                params[f"{self.prefix}shift{layer}"] = torch.zeros(size)
        return params

    def masks(self, batch_size: int, generator: Generator) -> list[Tensor] | None:
        """Dropout masks of one step, ``(N, width)`` per hidden layer; None without dropout."""
        if not self.dropout:
            return None
        return [
            (torch.rand(batch_size, width, generator=generator) > self.dropout).float()
            / (1 - self.dropout)
            for width in self.sizes[1:-1]
        ]

    def __call__(self, params: Params, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """Outputs ``(B, N, outputs)`` for inputs ``(N, inputs)`` or ``(B, N, inputs)``."""
        hidden = x
        for layer in range(self.layers):
            pre = self.prefix
            out = linear(hidden, params[f"{pre}weight{layer}"], params[f"{pre}bias{layer}"])
            if layer == self.layers - 1:
                break
            if self.norm != "none":
                normalize = layer_norm if self.norm == "layer" else batch_norm
                out = normalize(out, params[f"{pre}gain{layer}"], params[f"{pre}shift{layer}"])
            out = ACTIVATIONS[self.activation](out)
            if masks is not None:
                out = out * masks[layer]
            skip = self.residual and hidden.dim() == 3 and hidden.shape == out.shape
            hidden = hidden + out if skip else out
        return out


def draw_perceptron(
    draw: Sampler, inputs: int, outputs: int, wide_share: float = 0.14
) -> Perceptron:
    """A perceptron of random depth (1 to 8 hidden layers), width (8 to 400) and initialization.

    Args:
        wide_share: share of networks that may be wider than 96.
    """
    hidden = _draw_widths(draw, wide_share)
    deep = len(hidden) >= 4
    activation = draw.choice(
        ["relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky"], [8, 3, 4, 3, 2, 1, 1]
    )
    norm = draw.choice(["none", "layer", "batch"], [2, 2, 2] if deep else [6, 2, 2])
    tiny_weight = 3 if len(hidden) <= 2 else 0.3
    init = draw.choice(["torch", "he", "xavier", "tiny", "small"], [8, 2, 2, tiny_weight, 1])
    if deep and activation == "sigmoid":
        activation = "relu"  # eight sigmoid layers train under no optimizer
    output_init = "zero" if draw.chance(0.08) else None
    residual = draw.chance(0.5 if deep else 0.1)
    dropout = draw.choice([0, 0.1, 0.3], [8, 1, 1])
    return Perceptron(
        inputs, outputs, hidden, activation, init, norm, residual, output_init, dropout
    )


def _draw_widths(draw: Sampler, wide_share: float) -> list[int]:
    depth = draw.choice([1, 2, 3, 4, 6, 8], [6, 6, 3, 2, 1, 0.6])
    widest = 96
    if draw.chance(wide_share):
        widest = 400 if depth <= 3 else 128
    if draw.chance(0.6):
        return [draw.log_integer(8, widest)] * depth
    return [draw.log_integer(8, widest) for _ in range(depth)]


def draw_index(weights: Tensor | None, of: int, size: int, generator: Generator) -> Tensor:
    """``size`` indices below ``of`` with repetition, by weights if there are any."""
    if weights is None:
        return torch.randint(of, (size,), generator=generator)
    return torch.multinomial(weights, size, True, generator=generator)
