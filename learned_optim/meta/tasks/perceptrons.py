"""Perceptrons far from those that meta-train: deep, wide, on small and on large batches.

FashionMNIST and ReLU, in PyTorch's initialization. For evaluation.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from learned_optim.meta.tasks.images import BATCH_SIZE, image_mlp

_NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    "fashion-deep": ((64,) * 6, BATCH_SIZE),
    "fashion-wide": ((512, 512), BATCH_SIZE),
    "fashion-batch16": ((64,), 16),
    "fashion-batch1024": ((64,), 1024),
}

FAMILIES = {
    name: partial(image_mlp, "fashion", hidden, nn.ReLU, None, batch_size=batch_size)
    for name, (hidden, batch_size) in _NETWORKS.items()
}
