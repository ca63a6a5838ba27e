"""Going on from trained weights: whole networks and low-rank adapters (Hu et al. 2022).

The weights are trained where they are needed, always alike: AdamW with a fixed learning rate and
seed. A convolutional network that knows FashionMNIST sees 2,000 of its images faded; a language
model that knows one module of Python's library reads another, with all of its weights or with
adapters of rank 4 on every linear layer, whose second matrices start at zero. The held-out figures
are of the new data.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import torch_threads
from learned_optim.meta.tasks._base import EvaluationTask, ModuleTask, Params
from learned_optim.meta.tasks._examples import Examples, first_images
from learned_optim.meta.tasks.image_networks import convnet
from learned_optim.meta.tasks.images import image_task
from learned_optim.meta.tasks.language import Transformer, next_character_task

RANK, ALPHA = 4, 8.0
FINETUNE_IMAGES, HELD_OUT = 2000, 2000
LENGTH = 32
TEXT_TASKS = ("finetune-lm", "lora-lm")
# Printable ASCII and the line break: the alphabet of both texts.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def texts() -> tuple[str, str]:
    """The text of the language model's training, and that of its fine-tuning."""
    return inspect.getsource(argparse), inspect.getsource(inspect)


def pretrained(task: ModuleTask, steps: int, lr: float = 1e-3) -> nn.Module:
    """A task's module after AdamW's steps from a fixed seed, under a cosine."""
    generator = Generator().manual_seed(0)
    params: Params = {n: nn.Parameter(p) for n, p in task.init(generator).items()}
    optimizer = torch.optim.AdamW(params.values(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch_threads(1):
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(params, task.batch(generator)).backward()
            optimizer.step()
            schedule.step()
    task.module.load_state_dict(params)
    return task.module


class LowRank(nn.Module):
    """A frozen linear layer plus ``ALPHA / RANK`` times a trained product of rank ``RANK``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach())
        self.register_buffer("bias", base.bias.detach())
        self.down = nn.Parameter(torch.empty(RANK, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        delta = F.linear(F.linear(x, self.down), self.up)
        return F.linear(x, self.weight, self.bias) + ALPHA / RANK * delta


def with_adapters(network: nn.Module) -> nn.Module:
    """A copy of ``network`` with adapters, its only parameters, on linear layers."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, nn.Linear):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))
    return network


@lru_cache(maxsize=1)
def _trained_convnet(data: DataOptions) -> nn.Module:
    return pretrained(image_task("fashion", convnet, data, batch_size=64), 600)


def _finetune_convnet(data: DataOptions) -> ModuleTask:
    def faded(train: bool, count: int) -> Examples:
        examples = first_images("fashion", train, data, count)
        return Examples(0.6 * examples.inputs + 0.2, examples.targets)

    return ModuleTask(
        _trained_convnet(data),
        faded(True, FINETUNE_IMAGES).batches(32),
        tests=faded(False, HELD_OUT).all,
    )


def _small_transformer() -> nn.Module:
    return Transformer(len(ALPHABET), width=48, length=LENGTH, tied=True)


@lru_cache(maxsize=1)
def _trained_transformer() -> nn.Module:
    task = next_character_task(texts()[0], ALPHABET, _small_transformer, LENGTH)
    return pretrained(task, 600, lr=3e-3)


def _language_model(adapters: bool, data: DataOptions) -> ModuleTask:
    network = _trained_transformer()
    build = partial(with_adapters if adapters else copy.deepcopy, network)
    return next_character_task(texts()[1], ALPHABET, build, LENGTH)


FAMILIES = {
    "finetune-convnet": EvaluationTask(
        _finetune_convnet, steps=1000, quick=400, data_set="fashion"
    ),
    "finetune-lm": EvaluationTask(partial(_language_model, False), steps=1500, quick=400),
    "lora-lm": EvaluationTask(partial(_language_model, True), steps=1500, quick=400),
}
