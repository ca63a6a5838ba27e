"""The tasks of the larger tier, for `benchmarks results`.

A residual network and a vision transformer on CIFAR-10 with random crops and flips for ten epochs,
a table of 50,000 rows, and a language model that goes on with a text which it has not seen. The
language model of the tier is the package's own task ``char-lm-gpt``.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim._extras import import_extra
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.tasks._base import Batch, EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, first_images, standardized
from learned_optim.meta.tasks.finetuning import pretrained
from learned_optim.meta.tasks.image_networks import ResNet, VisionTransformer
from learned_optim.meta.tasks.images import Shape
from learned_optim.meta.tasks.language import Transformer, library_modules, next_character_task
from learned_optim.meta.tasks.tabular import tabular_network

BATCH_SIZE = 128
MARGIN = 4  # pixels by which a crop may lie beside the image (He et al. 2016)


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Returns images ``(N, C, H, W)``, each cropped from a padded one, half of them mirrored."""
    count, _, height, width = images.shape
    corners = torch.randint(2 * MARGIN + 1, (count, 2), generator=generator).tolist()
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = F.pad(images, [MARGIN] * 4)
    crops = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, corners, strict=True)
    ]
    found = torch.stack(crops)
    return torch.where(mirrored[:, None, None, None], found.flip(-1), found)


def cifar10(network: Callable[[Shape, int], nn.Module], data: DataOptions) -> ModuleTask:
    """Returns the training of a network on all images; 390 batches are an epoch."""
    images = load_images("cifar10", True, data)

    def draw(generator: Generator) -> Batch:
        index = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        inputs, targets = images.batch(index)
        return augmented(inputs, generator), targets

    build = partial(network, images.shape, images.classes)
    return ModuleTask(build, draw, tests=first_images("cifar10", False, data).all)


def large_table(data: DataOptions) -> ModuleTask:
    """Returns the classification of 50,000 rows in ten classes by a network of width 256."""
    x, y = import_extra("sklearn.datasets").make_classification(
        50_000, n_features=60, n_informative=30, n_redundant=10, n_classes=10,
        n_clusters_per_class=3, class_sep=1.5, flip_y=0.02, random_state=0,
    )  # fmt: skip
    examples = Examples(standardized(torch.tensor(x).float()), torch.tensor(y).long())
    return examples.task(partial(tabular_network, 60, 10, width=256), BATCH_SIZE)


@lru_cache(maxsize=1)
def trained_model() -> tuple[nn.Module, str]:
    """Returns a language model after 1,000 steps on half of Python's library; the other half."""
    texts = library_modules()
    half = len(texts) // 2
    build = partial(Transformer, len(string.printable), width=192, depth=4, length=128)
    task = next_character_task("".join(texts[:half]), string.printable, build, 128, 8)
    return pretrained(task, 1000), "".join(texts[half:])


def fine_tuning(data: DataOptions) -> ModuleTask:
    """Returns the training of :func:`trained_model` on the other half."""
    network, text = trained_model()
    build = partial(copy.deepcopy, network)
    return next_character_task(text, string.printable, build, 128, 8, most_tests=200)


FAMILIES = {
    "resnet": EvaluationTask(
        partial(cifar10, partial(ResNet, widths=(32, 64, 128))), data_set="cifar10"
    ),
    "vit": EvaluationTask(
        partial(cifar10, partial(VisionTransformer, width=128, depth=4, side=8)),
        data_set="cifar10",
    ),
    "table": EvaluationTask(large_table),
    "fine-tuning": EvaluationTask(fine_tuning),
}
