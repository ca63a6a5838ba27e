"""Multi-layer perceptrons on flattened images: the thesis's networks (sections 4.3 and 4.4).

Cross-entropy, batches of 128 drawn with replacement, pixels in [0, 1]. Initialization is the
thesis's (weights ~ N(0, 0.001^2), biases 0) or, under the suffix ``-torch``, PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, nn

from learned_optim.meta.data import DataOptions, halves, load_images
from learned_optim.meta.tasks._base import Batch, FixedTask, ModuleTask, TaskFamily, TaskOptions

THESIS_STD = 0.001
BATCH_SIZE = 128

# Sets with a half set apart for meta-training; every other set only evaluates, unless a family's
# name asks for its half (transfer.py). Shipped checkpoints use MNIST's alone.
META_SETS = ("mnist", "digits")


def mlp(
    inputs: int, hidden: tuple[int, ...], classes: int, activation: type[nn.Module]
) -> nn.Module:
    """Flatten, then linear layers of the given widths with ``activation`` between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def check_split(image_set: str, options: TaskOptions) -> None:
    """Refuse the meta-training split of a set that only evaluates, before anything is loaded.

    Raises:
        ValueError: it is asked for.
    """
    if options.split == "meta" and image_set not in META_SETS:
        raise ValueError(
            f"{image_set!r} is for evaluation only: meta-training on it would leak the evaluation. "
            f"Sets that may meta-train: {', '.join(META_SETS)}"
        )


def image_batches(
    image_set: str, options: TaskOptions, batch_size: int = BATCH_SIZE, halved: bool = False
) -> Callable[[Generator], Batch]:
    """A source of random training batches from the images that ``options.split`` allows.

    Args:
        image_set: which images.
        options: which split, and where data is.
        batch_size: images per batch.
        halved: split the set in halves even if it is none of :data:`META_SETS`.

    Raises:
        ValueError: the meta-training split of a set that only evaluates.
    """
    if not halved:
        check_split(image_set, options)
    images = load_images(image_set, True, options.data)
    if halved or image_set in META_SETS:
        meta, evaluation = halves(images)
        images = meta if options.split == "meta" else evaluation

    def draw(generator: Generator) -> Batch:
        return images.batch(torch.randint(len(images), (batch_size,), generator=generator))

    return draw


def image_mlp(
    image_set: str,
    hidden: tuple[int, ...],
    activation: type[nn.Module],
    init_std: float | None,
    options: TaskOptions,
    batch_size: int = BATCH_SIZE,
    halved: bool = False,
) -> TaskFamily:
    """The family of one network on one image set; ``halved`` as :func:`image_batches` takes it."""
    if not halved:
        check_split(image_set, options)
    first = load_images(image_set, True, options.data)
    task = ModuleTask(
        build=partial(mlp, math.prod(first.shape), hidden, first.classes, activation),
        batches=image_batches(image_set, options, batch_size, halved),
        init_std=init_std,
        tests=partial(image_test_set, image_set, options.data),
    )
    return of_images(FixedTask(task), image_set, halved)


def of_images(family: FixedTask, image_set: str, halved: bool = False) -> FixedTask:
    """``family``, which says now what images it reads."""
    family.data_sets, family.halved = (image_set,), halved or image_set in META_SETS
    return family


def image_test_set(
    image_set: str, data: DataOptions, count: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` test images, or all of them, and their labels."""
    images = load_images(image_set, False, data)
    return images.batch(torch.arange(len(images) if count is None else min(count, len(images))))


_NETWORKS: dict[str, tuple[str, tuple[int, ...], type[nn.Module]]] = {
    "mnist": ("mnist", (20,), nn.Sigmoid),
    "mnist-40": ("mnist", (40,), nn.Sigmoid),
    "mnist-2layer": ("mnist", (20, 20), nn.Sigmoid),
    "mnist-relu": ("mnist", (20,), nn.ReLU),
    "fashion": ("fashion", (20,), nn.Sigmoid),
    "emnist-letters": ("emnist-letters", (20,), nn.Sigmoid),
    "cifar10": ("cifar10", (20,), nn.Sigmoid),
    "svhn": ("svhn", (20,), nn.Sigmoid),
    "digits": ("digits", (20,), nn.Sigmoid),
}

FAMILIES = {
    name + suffix: partial(image_mlp, image_set, hidden, activation, init_std)
    for name, (image_set, hidden, activation) in _NETWORKS.items()
    for suffix, init_std in (("", THESIS_STD), ("-torch", None))
}
