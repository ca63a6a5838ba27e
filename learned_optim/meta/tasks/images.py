"""Multi-layer perceptrons on flattened images: the thesis's networks (sections 4.3 and 4.4).

Cross-entropy, batches of 128 drawn with replacement, pixels in [0, 1]. Initialization is the
thesis's (weights ~ N(0, 0.001^2), biases 0) or, under the suffix ``-torch``, PyTorch's own. Deep
and wide ReLU networks on FashionMNIST, and other batch sizes, are for evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, nn

from learned_optim.meta.data import halves, load_images
from learned_optim.meta.tasks._base import Batch, FixedTask, ModuleTask, TaskFamily, TaskOptions
from learned_optim.meta.tasks._examples import first_images

THESIS_STD = 0.001
BATCH_SIZE = 128

# Sets with a half set apart for meta-training; every other set only evaluates, unless a family's
# name asks for its half (transfer.py). Shipped checkpoints use MNIST's alone.
META_SETS = ("mnist", "digits")

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


def image_batches(
    image_set: str, options: TaskOptions, batch_size: int = BATCH_SIZE, halved: bool = False
) -> Callable[[Generator], Batch]:
    """A source of random training batches from the images that ``options.split`` allows.

    Args:
        image_set: which images.
        options: which split, and where data is.
        batch_size: images per batch.
        halved: whether each split has its half of the images.
    """
    images = load_images(image_set, True, options.data)
    if halved:
        images = halves(images)[0 if options.split == "meta" else 1]

    def draw(generator: Generator) -> Batch:
        return images.batch(torch.randint(len(images), (batch_size,), generator=generator))

    return draw


def image_family(
    image_set: str,
    build: Callable[[Shape, int], nn.Module],
    options: TaskOptions,
    *,
    batch_size: int = BATCH_SIZE,
    init_std: float | None = None,
    held_out: int | None = None,
    halved: bool | None = None,
    stackable: bool | None = None,
) -> TaskFamily:
    """The training of one network on one image set.

    Args:
        image_set: which images.
        build: makes the network from the shape ``(C, H, W)`` of the images and their classes.
        options: which split, and where data is.
        batch_size: images per batch.
        init_std: as :class:`ModuleTask` takes it.
        held_out: how many test images are read; all of them if not given.
        halved: whether each split has its half of the images; of :data:`META_SETS` if not given.
        stackable: as :class:`FixedTask` takes it.

    Raises:
        ValueError: the meta-training split of a set that only evaluates; nothing is loaded.
    """
    halved = image_set in META_SETS if halved is None else halved
    if options.split == "meta" and not halved:
        raise ValueError(
            f"{image_set!r} is for evaluation only: meta-training on it would leak the evaluation. "
            f"Sets that may meta-train: {', '.join(META_SETS)}"
        )
    images = load_images(image_set, True, options.data)
    task = ModuleTask(
        build=partial(build, images.shape, images.classes),
        batches=image_batches(image_set, options, batch_size, halved),
        init_std=init_std,
        tests=lambda: first_images(image_set, False, options.data, held_out).all(),
    )
    family = FixedTask(task, stackable=stackable)
    family.data_sets, family.halved = (image_set,), halved
    return family


def image_mlp(
    image_set: str,
    hidden: tuple[int, ...],
    activation: type[nn.Module],
    init_std: float | None,
    options: TaskOptions,
    batch_size: int = BATCH_SIZE,
    halved: bool | None = None,
) -> TaskFamily:
    """:func:`image_family` of a perceptron with hidden layers of the given widths."""

    def build(shape: Shape, classes: int) -> nn.Module:
        return mlp(math.prod(shape), hidden, classes, activation)

    return image_family(
        image_set, build, options, batch_size=batch_size, init_std=init_std, halved=halved
    )


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
        name + suffix: partial(image_mlp, image_set, hidden, activation, init_std)
        for name, (image_set, hidden, activation) in _THESIS.items()
        for suffix, init_std in (("", THESIS_STD), ("-torch", None))
    },
    **{
        name: partial(image_mlp, "fashion", hidden, nn.ReLU, None, batch_size=batch_size)
        for name, (hidden, batch_size) in _OTHER.items()
    },
}
