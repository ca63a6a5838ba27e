"""Bytes of optimizer state per parameter, and bytes that ranks send, on models that people know.

    python -m benchmarks memory      # seconds; writes docs/performance/memory.json

Models and states live on the meta device, so that nothing is allocated. States of other
optimizers follow from their reference implementations:

- Adam: two float32 moments.
- AdamW, 8 bit (bitsandbytes): two bytes and one float32 scale each per block of 256; tensors of
  fewer than 4,096 elements keep float32 moments.
- Muon: one float32 momentum for hidden matrices; Adam for embeddings, readouts, and vectors.
- SOAP: Adam's moments, and for every side of a tensor of two or more dimensions, if it is at most
  10,000 long, a covariance and its eigenvectors in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.common import PERFORMANCE, save, shipped
from learned_optim import load_rule
from learned_optim.rules import UpdateRule
from learned_optim.rules._basis import rotated_sides
from learned_optim.summary import table

OUTPUT = PERFORMANCE / "memory.json"
LONGEST_SIDE = 10_000  # of SOAP, `max_precond_dim`
BLOCK, SMALLEST_8BIT = 256, 4096  # of bitsandbytes
RANKS = (8, 64, 512)


class Tensor(NamedTuple):
    """Shape of a parameter, and whether Muon leaves it to Adam."""

    shape: tuple[int, ...]
    adam: bool

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


Model = list[Tensor]


def torchvision_model(name: str, adam: tuple[str, ...]) -> Model:
    """Returns the parameters of a torchvision model; names in ``adam`` are Adam's."""
    from torchvision import models

    with torch.device("meta"):
        model = models.get_model(name)
    return [
        Tensor(tuple(p.shape), p.dim() < 2 or any(part in n for part in adam))
        for n, p in model.named_parameters()
    ]


def vector(size: int) -> Tensor:
    """Returns a bias or a gain."""
    return Tensor((size,), True)


def gpt2() -> Model:
    """Returns the parameters of GPT-2 with 124M of them; readout and embedding are tied."""
    width, model = 768, [Tensor((50257, 768), True), Tensor((1024, 768), True)]
    for _ in range(12):
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            model += [Tensor((rows * width, columns * width), False), vector(rows * width)]
        model += [vector(width)] * 4
    return [*model, vector(width), vector(width)]


def decoder() -> Model:
    """Returns the parameters of a decoder with 1.2 billion: the shapes of Llama 3.2 1B."""
    width, keys, hidden = 2048, 512, 8192
    model = [Tensor((128256, width), True)]
    for _ in range(16):
        shapes = [(width, width), (keys, width), (keys, width), (width, width)]
        shapes += [(hidden, width), (hidden, width), (width, hidden)]
        model += [*(Tensor(shape, False) for shape in shapes), vector(width), vector(width)]
    return [*model, vector(width)]


MODELS: dict[str, Callable[[], Model]] = {
    "ResNet-50": lambda: torchvision_model("resnet50", ("fc.",)),
    "ViT-B/16": lambda: torchvision_model("vit_b_16", ("class_token", "pos_embed", "heads.")),
    "GPT-2": gpt2,
    "decoder": decoder,
}


def adam(tensor: Tensor) -> float:
    return 8 * tensor.size


def adam_8bit(tensor: Tensor) -> float:
    if tensor.size < SMALLEST_8BIT:
        return adam(tensor)
    return 2 * (tensor.size + 4 * -(-tensor.size // BLOCK))


def muon(tensor: Tensor) -> float:
    return adam(tensor) if tensor.adam else 4 * tensor.size


def soap(tensor: Tensor) -> float:
    sides = tensor.shape if len(tensor.shape) > 1 else ()
    return adam(tensor) + 4 * sum(2 * n * n for n in sides if n <= LONGEST_SIDE)


def learned(rule: UpdateRule) -> Callable[[Tensor], float]:
    """Returns the bytes of a rule's state as a function of the parameter."""
    return lambda tensor: rule.state_bytes(tensor.shape)


def optimizers() -> dict[str, Callable[[Tensor], float]]:
    """Returns bytes of state as functions of a parameter, by the optimizer's name."""
    known = {"Adam": adam, "AdamW, 8 bit": adam_8bit, "Muon": muon, "SOAP": soap}
    return known | {f"`{name}`": learned(load_rule(name)) for name in shipped()}


def measure() -> dict[str, Any]:
    """Returns bytes per parameter by model and optimizer."""
    found: dict[str, Any] = {}
    for name, build in MODELS.items():
        model = build()
        size = sum(tensor.size for tensor in model)
        found[name] = {"parameters": size}
        for optimizer, state in optimizers().items():
            found[name][optimizer] = round(sum(map(state, model)) / size, 2)
    return found


def memory_table(found: dict[str, Any]) -> str:
    """Returns the table, Markdown."""
    names = [name for name in next(iter(found.values())) if name != "parameters"]
    rows = [
        [name, *(f"{row[name]:.1f}" for row in found.values())]
        for name in names
    ]  # fmt: skip
    head = [f"{name}, {row['parameters'] / 1e6:,.0f}M" for name, row in found.items()]
    return table(["bytes per parameter", *head], rows)


def traffic_table() -> str:
    """Returns the megabytes that a rank sends per step of float32 tensors, Markdown.

    An all-gather or reduce-scatter of ``size`` elements sends ``size (n - 1) / n`` from each of
    ``n`` ranks; an exchange with owners, of which a rank's part is ``size / n``, an n-th of that.
    """
    rows = []
    for name in ("GPT-2", "decoder"):
        model = MODELS[name]()
        whole = sum(tensor.size for tensor in model)
        rotated = sum(tensor.size for tensor in model if any(rotated_sides(tensor.shape)))
        hidden = sum(tensor.size for tensor in model if not tensor.adam)
        for what, sent, owned in (
            ("FSDP2 itself", 3 * whole, False),
            ("gathered updates", whole, False),
            ("Muon with owners", 2 * hidden, True),
            (f"`{shipped()[0]}`", 3 * rotated, True),
        ):
            sizes = (4e-6 * sent * (n - 1) / n / (n if owned else 1) for n in RANKS)
            rows.append([name, what, *(f"{size:,.1f}" for size in sizes)])
    return table(["", "megabytes per step and rank", *(f"{n} ranks" for n in RANKS)], rows)


def run(options: argparse.Namespace) -> None:
    print(memory_table(save(OUTPUT, measure())), traffic_table(), sep="\n\n")
