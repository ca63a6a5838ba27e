"""Layers wider than any of meta-training's, against AdamW with a cosine tuned per network.

    python -m benchmarks.widths [--workers 2]     # resumable; docs/results/widths.json

Perceptrons learn what a random tanh network of 32 units says of 64 inputs, with a little noise:
a step that suits a layer of 100 inputs is not one that suits 4,096.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks import on_field
from learned_optim.meta import field_report
from learned_optim.meta.field import FieldConfig
from learned_optim.meta.tasks import FixedTask, ModuleTask, TaskFamily, TaskOptions
from learned_optim.meta.tasks._base import Horizon

RESULT = on_field.RESULTS / "widths.json"
INPUTS, TEACHER_UNITS, NOISE, BATCH_SIZE = 64, 32, 0.1, 64
NETWORKS = {"128": [128], "1024": [1024], "4096": [4096], "1024x1024": [1024, 1024]}


def _teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(INPUTS, TEACHER_UNITS), nn.Linear(TEACHER_UNITS, 1)
        for layer, scale in ((first, 2.0), (last, 1.0)):
            nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
    return nn.Sequential(first, nn.Tanh(), last).requires_grad_(False)


def _family(hidden: list[int], options: TaskOptions) -> TaskFamily:
    teacher = _teacher()

    def build() -> nn.Module:
        sizes = [INPUTS, *hidden]
        layers: list[nn.Module] = []
        for fan_in, width in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def batches(generator: Generator, count: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, INPUTS, generator=generator)
        noise = NOISE * torch.randn(count, 1, generator=generator)
        return inputs, teacher(inputs) + noise

    def tests() -> tuple[Tensor, Tensor]:
        return batches(Generator().manual_seed(1), 4096)

    return FixedTask(ModuleTask(build, batches, nn.functional.mse_loss, tests=tests))


FAMILIES = {name: partial(_family, hidden) for name, hidden in NETWORKS.items()}
FIELD = {name: Horizon(2000, 500) for name in NETWORKS}


def measure(checkpoint: str, output: Path, workers: int) -> None:
    """Run what is missing in ``output``, and write the summary."""
    config = FieldConfig(
        checkpoints=(checkpoint,),
        tasks=tuple(f"benchmarks.widths:{name}" for name in NETWORKS),
        baselines=("adamw-cosine",),
        seeds=3,
        output=output,
        workers=workers,
    )
    on_field.execute(config, "widths", RESULT)
    print(table())


def table(path: Path | None = None) -> str:
    """Final losses relative to those of tuned AdamW, network by network."""

    def text(summary: dict[str, Any]) -> str:
        return field_report.ratios_table(summary).replace("benchmarks.widths:", "")

    return on_field.shown(path or RESULT, text)


if __name__ == "__main__":
    on_field.main(__doc__, "widths", measure)
