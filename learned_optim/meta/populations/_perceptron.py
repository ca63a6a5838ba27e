"""Multilayer perceptrons for ``B`` copies at once, and the random ones of the mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from learned_optim.meta.populations._base import Params
from learned_optim.meta.populations._layers import (
    ACTIVATIONS,
    batch_norm,
    init_bias,
    init_weight,
    layer_norm,
    linear,
)
from learned_optim.meta.sampler import Sampler

#: Share of perceptrons that may be wider than 96.
WIDE_SHARE, LARGE_WIDE_SHARE = 0.2, 0.35


class Perceptron:
    """A multilayer perceptron for ``B`` copies at once.

    Args:
        inputs, outputs: features of both ends.
        hidden: widths of the hidden layers.
        activation: a key of :data:`ACTIVATIONS`, or a function.
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
        activation: str | Callable[[Tensor], Tensor],
        init: str,
        norm: str = "none",
        residual: bool = False,
        output_init: str | None = None,
        dropout: float = 0.0,
        prefix: str = "",
    ) -> None:
        self.sizes = [inputs, *hidden, outputs]
        self.activate = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.init_kind, self.norm = init, norm
        self.residual, self.output_init = residual, output_init or init
        self.dropout, self.prefix = dropout, prefix
        self.layers = len(self.sizes) - 1

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
                gain, shift = params[f"{pre}gain{layer}"], params[f"{pre}shift{layer}"]
                normalize = layer_norm if self.norm == "layer" else partial(batch_norm, dims=1)
                out = normalize(out, gain.unsqueeze(1), shift.unsqueeze(1))
            out = self.activate(out)
            if masks is not None:
                out = out * masks[layer]
            skip = self.residual and hidden.dim() == 3 and hidden.shape == out.shape
            hidden = hidden + out if skip else out
        return out


def draw_perceptron(draw: Sampler, inputs: int, outputs: int) -> Perceptron:
    """A perceptron of random depth (1 to 8 hidden layers), width (8 to 512) and initialization."""
    hidden = _draw_widths(draw)
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


def _draw_widths(draw: Sampler) -> list[int]:
    depth = draw.choice([1, 2, 3, 4, 6, 8], [6, 6, 3, 2, 1, 0.6])
    widest = 96
    if draw.chance(LARGE_WIDE_SHARE if draw.large else WIDE_SHARE):
        widest = 512 if depth <= 3 else 192
    if draw.chance(0.6):
        return [draw.width(8, widest)] * depth
    return [draw.width(8, widest) for _ in range(depth)]
