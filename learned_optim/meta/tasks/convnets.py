"""Small convolutional networks on images, with and without batch norm, in PyTorch's initialization.

Two 3x3 convolutions with pooling and a linear layer: what a user's first script trains. For
evaluation; batch norm's running statistics are buffers of the module and used in its test.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from learned_optim.meta.data import load_images
from learned_optim.meta.tasks._base import FixedTask, ModuleTask, TaskFamily, TaskOptions
from learned_optim.meta.tasks.images import check_split, image_batches, image_test_set, of_images


def convnet(
    shape: tuple[int, int, int], widths: tuple[int, int], classes: int, batch_norm: bool
) -> nn.Module:
    """Two blocks of convolution, optional batch norm, ReLU and 2x2 max-pooling; then linear.

    Args:
        shape: ``(C, H, W)`` of the images.
        widths: channels of the two convolutions.
        classes: outputs.
        batch_norm: normalize after each convolution.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for planes in widths:
        layers.append(nn.Conv2d(channels, planes, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(planes))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = planes, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


def image_convnet(
    image_set: str, widths: tuple[int, int], batch_norm: bool, options: TaskOptions
) -> TaskFamily:
    """The family of one convolutional network on one image set."""
    check_split(image_set, options)
    images = load_images(image_set, True, options.data)
    task = ModuleTask(
        build=partial(convnet, images.shape, widths, images.classes, batch_norm),
        batches=image_batches(image_set, options),
        tests=partial(image_test_set, image_set, options.data),
    )
    # Running statistics live in the module, which several optimizees would share.
    return of_images(FixedTask(task, stackable=not batch_norm), image_set)


FAMILIES = {
    "mnist-cnn": partial(image_convnet, "mnist", (8, 16), False),
    "mnist-cnn-bn": partial(image_convnet, "mnist", (8, 16), True),
    "cifar10-cnn": partial(image_convnet, "cifar10", (8, 16), False),
    "cifar10-cnn-bn": partial(image_convnet, "cifar10", (8, 16), True),
}
