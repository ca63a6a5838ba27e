"""Perceptrons on sets that otherwise only evaluate, in halves, and on all sets but one.

For the thesis's wider question, what of a learned optimizer carries over to other data. A name
that ends in ``-half`` asks for the split that MNIST always has: one half of the training images
meta-trains, the other evaluates. ``all-but-mnist`` draws its tasks from the halves of every set of
:data:`SETS` but MNIST, so that a rule trained on it has never seen MNIST. Networks are the
thesis's, 20 sigmoid units; shipped checkpoints are trained on none of these.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from learned_optim.meta.tasks._base import TaskFamily, TaskMixture, TaskOptions
from learned_optim.meta.tasks.images import META_SETS, THESIS_STD, image_mlp

#: The sets of the leave-one-out families.
SETS = ("mnist", "fashion", "emnist-letters", "cifar10")


def half(image_set: str, options: TaskOptions) -> TaskFamily:
    """The thesis's network on one half of a set: which one, ``options.split`` says."""
    return image_mlp(image_set, (20,), nn.Sigmoid, THESIS_STD, options, halved=True)


def all_but(left_out: str, options: TaskOptions) -> TaskFamily:
    """The halves of every set but ``left_out``, drawn with equal probabilities."""
    return TaskMixture({name: half(name, options) for name in SETS if name != left_out})


FAMILIES = {
    **{f"{name}-half": partial(half, name) for name in SETS if name not in META_SETS},
    **{f"all-but-{name}": partial(all_but, name) for name in SETS},
}
