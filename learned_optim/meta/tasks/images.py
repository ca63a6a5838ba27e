"""Multi-layer perceptrons on flattened images: the thesis's networks (sections 4.3 and 4.4).

Cross-entropy, batches of 128 drawn with replacement, pixels in [0, 1]. Initialization is the
thesis's (weights ~ N(0, 0.001^2), biases 0) or, under the suffix ``-torch``, PyTorch's own. Deep
and wide ReLU networks on FashionMNIST, and other batch sizes, are for evaluation.

Transfer to other data: ``SET-half`` meta-trains on one half of a set and evaluates on the other,
as MNIST's tasks always do. ``all-but-SET`` draws from the halves of all other sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from learned_optim.meta.data import DataOptions, halves, load_images
from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    ModuleTask,
    TaskFamily,
    TaskMixture,
    TaskOptions,
)
from learned_optim.meta.tasks._examples import first_images

THESIS_STD = 0.001
BATCH_SIZE = 128

# Sets with a half set apart for meta-training; every other set only evaluates, unless a family's
# name asks for its half. Shipped checkpoints use MNIST's alone.
META_SETS = ("mnist", "digits")
# Sets of the families that leave one out.
TRANSFER_SETS = ("mnist", "fashion", "emnist-letters", "cifar10")

Shape = tuple[int, int, int]  # (C, H, W)


def mlp(
    inputs: int, hidden: tuple[int, ...], classes: int, activation: type[nn.Module]
) -> nn.Module:
    """Flatten, then linear layers of the given widths with ``activation`` between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _perceptron(
    hidden: tuple[int, ...], activation: type[nn.Module] = nn.ReLU
) -> Callable[[Shape, int], nn.Module]:
    """:func:`mlp` as a function of the images' shape and number of classes."""
    return lambda shape, classes: mlp(math.prod(shape), hidden, classes, activation)


def image_task(
    image_set: str,
    build: Callable[[Shape, int], nn.Module],
    data: DataOptions,
    *,
    half: int | None = None,
    batch_size: int = BATCH_SIZE,
    init_std: float | None = None,
    held_out: int | None = None,
) -> ModuleTask:
    """The training of one network on one image set.

    Args:
        build: makes the network from the shape ``(C, H, W)`` of the images and their classes.
        half: which of their :func:`halves` is read; all images if not given.
        init_std: as :class:`ModuleTask` takes it.
        held_out: how many test images are read; all of them if not given.
    """
    images = load_images(image_set, True, data)
    if half is not None:
        images = halves(images)[half]

    def draw(generator: Generator) -> Batch:
        return images.batch(torch.randint(len(images), (batch_size,), generator=generator))

    return ModuleTask(
        partial(build, images.shape, images.classes),
        draw,
        init_std=init_std,
        tests=lambda: first_images(image_set, False, data, held_out).all(),
    )


def image_family(
    image_set: str,
    build: Callable[[Shape, int], nn.Module],
    options: TaskOptions,
    *,
    halved: bool | None = None,
    stackable: bool | None = None,
    **settings: Any,
) -> TaskFamily:
    """The family of an :func:`image_task`, with its split of the images.

    Args:
        build: as :func:`image_task` takes it.
        halved: whether each split has its half of the images; of :data:`META_SETS` if not given.
        stackable: as :class:`FixedTask` takes it.
        **settings: of :func:`image_task`.

    Raises:
        ValueError: the meta-training split of a set that only evaluates; nothing is loaded.
    """
    halved = image_set in META_SETS if halved is None else halved
    if options.split == "meta" and not halved:
        raise ValueError(
            f"{image_set!r} is for evaluation only: meta-training on it would leak the evaluation. "
            f"Sets that may meta-train: {', '.join(META_SETS)}"
        )
    half = None if not halved else 0 if options.split == "meta" else 1
    task = image_task(image_set, build, options.data, half=half, **settings)
    family = FixedTask(task, stackable=stackable)
    family.data_sets, family.halved = (image_set,), halved
    return family


def _half(image_set: str, options: TaskOptions) -> TaskFamily:
    """The thesis's network on the half of a set that ``options.split`` says."""
    network = _perceptron((20,), nn.Sigmoid)
    return image_family(image_set, network, options, init_std=THESIS_STD, halved=True)


def _all_but(left_out: str, options: TaskOptions) -> TaskFamily:
    """The halves of every set but ``left_out``, drawn with equal probabilities."""
    return TaskMixture({name: _half(name, options) for name in TRANSFER_SETS if name != left_out})


_THESIS: dict[str, tuple[str, tuple[int, ...], type[nn.Module]]] = {
    "mnist": ("mnist", (20,), nn.Sigmoid),
    "mnist-40": ("mnist", (40,), nn.Sigmoid),
    "mnist-2layer": ("mnist", (20, 20), nn.Sigmoid),
    "mnist-relu": ("mnist", (20,), nn.ReLU),
    "fashion": ("fashion", (20,), nn.Sigmoid),
    "emnist-letters": ("emnist-letters", (20,), nn.Sigmoid),
    "cifar10": ("cifar10", (20,), nn.Sigmoid),
    "digits": ("digits", (20,), nn.Sigmoid),
}
_OTHER: dict[str, tuple[tuple[int, ...], int]] = {
    "fashion-deep": ((64,) * 6, BATCH_SIZE),
    "fashion-wide": ((512, 512), BATCH_SIZE),
    "fashion-batch16": ((64,), 16),
    "fashion-batch1024": ((64,), 1024),
}

FAMILIES = {
    **{
        name + suffix: partial(
            image_family, image_set, _perceptron(hidden, activation), init_std=init_std
        )
        for name, (image_set, hidden, activation) in _THESIS.items()
        for suffix, init_std in (("", THESIS_STD), ("-torch", None))
    },
    **{
        name: partial(image_family, "fashion", _perceptron(hidden), batch_size=batch_size)
        for name, (hidden, batch_size) in _OTHER.items()
    },
    **{f"{name}-half": partial(_half, name) for name in TRANSFER_SETS if name not in META_SETS},
    **{f"all-but-{name}": partial(_all_but, name) for name in TRANSFER_SETS},
}
