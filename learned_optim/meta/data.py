"""Image sets in memory: torchvision's files and scikit-learn's digits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from learned_optim._extras import import_extra

DATA_VARIABLE = "LEARNED_OPTIM_DATA"


@dataclass(frozen=True)
class DataOptions:
    """Where data is looked for."""

    data_dir: Path | None = None
    """Folder in torchvision's layout; otherwise $LEARNED_OPTIM_DATA, otherwise a cache folder."""
    download: bool = True
    """Let torchvision download a set that the folder lacks."""
    text: Path | None = None
    """Text file for the character language models; otherwise a module of Python's own library."""

    def root(self) -> Path:
        """The folder that is read."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        if os.environ.get(DATA_VARIABLE):
            return Path(os.environ[DATA_VARIABLE]).expanduser()
        return Path.home() / ".cache" / "learned_optim" / "data"


@dataclass(frozen=True)
class Images:
    """A labelled image set.

    Attributes:
        pixels: uint8, shape ``(N, C, H, W)``, 0 to ``white``.
        labels: int64, shape ``(N,)``, 0 to ``classes - 1``.
        classes: number of classes.
        white: the pixel value that means 1.0.
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    white: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        _, c, h, w = self.pixels.shape
        return c, h, w

    def subset(self, index: Tensor) -> Images:
        """The images at ``index`` (int64, shape ``(M,)``)."""
        return Images(self.pixels[index], self.labels[index], self.classes, self.white)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images at ``index`` as float32 in [0, 1], shape ``(M, C, H, W)``, and their labels."""
        return self.pixels[index].float().div_(self.white), self.labels[index]


def halves(images: Images) -> tuple[Images, Images]:
    """A fixed random split: one half meta-trains, the other evaluates.

    The permutation depends on the number of images alone: it is the same in every process.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    middle = len(images) // 2
    return images.subset(order[:middle]), images.subset(order[middle:])


def load_images(name: str, train: bool, options: DataOptions) -> Images:
    """An image set by name, from disk; cached for the process.

    Args:
        name: ``mnist``, ``fashion``, ``emnist-letters``, ``cifar10`` or ``digits``.
        train: the training images, otherwise the test images.
        options: where to look, and whether to download.

    Raises:
        FileNotFoundError: the set is not there and was not or could not be downloaded.
    """
    if name == "digits":
        return _load_digits(train)
    return _load_torchvision(name, train, options.root(), options.download)


@lru_cache(maxsize=4)
def _load_digits(train: bool) -> Images:
    bunch = import_extra("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8), 0..16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    index = order[360:] if train else order[:360]
    return Images(pixels[index], torch.from_numpy(bunch.target).long()[index], 10, white=16)


@lru_cache(maxsize=8)
def _load_torchvision(name: str, train: bool, root: Path, download: bool) -> Images:
    datasets = import_extra("torchvision.datasets")
    builders = {
        "mnist": datasets.MNIST,
        "fashion": datasets.FashionMNIST,
        "emnist-letters": partial(datasets.EMNIST, split="letters"),
        "cifar10": datasets.CIFAR10,
    }
    try:
        images = builders[name](root, train=train, download=download)  # what is there is kept
    except (RuntimeError, OSError) as error:
        attempt = "downloading it failed" if download else "downloading is switched off"
        raise FileNotFoundError(
            f"no {name} images under {root} and {attempt} ({error}). Point --data-dir or "
            f"${DATA_VARIABLE} at a folder in torchvision's layout, or run once with --download "
            f"on a machine with network access"
        ) from error
    pixels, labels = torch.as_tensor(images.data), torch.as_tensor(images.targets).long()
    # torchvision's layouts: (N, 32, 32, 3) of CIFAR-10, (N, 28, 28) of the others.
    pixels = pixels.permute(0, 3, 1, 2).contiguous() if name == "cifar10" else pixels.unsqueeze(1)
    if name == "emnist-letters":  # labels 1 to 26
        return Images(pixels, labels - 1, 26)
    return Images(pixels, labels, 10)
