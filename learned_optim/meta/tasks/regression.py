"""Regression on scikit-learn's bundled diabetes data: 10 standardized inputs, one output.

A 10-32-1 tanh network in PyTorch's initialization on the mean squared error; a fifth of the 442
patients is held out.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.tasks._base import (
    Batch,
    FixedTask,
    ModuleTask,
    TaskFamily,
    TaskOptions,
    evaluation_only,
)

BATCH_SIZE = 64


@lru_cache(maxsize=1)
def _diabetes() -> tuple[Tensor, Tensor]:
    """Inputs ``(442, 10)`` and targets ``(442, 1)``, standardized, in a fixed random order."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ImportError(
            "the regression data comes with scikit-learn: pip install 'learned-optim[meta]'"
        ) from error
    inputs, targets = load_diabetes(return_X_y=True)
    x, y = torch.tensor(inputs).float(), torch.tensor(targets).float().unsqueeze(1)
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    return ((x - x.mean(0)) / x.std(0))[order], ((y - y.mean()) / y.std())[order]


def _regression(options: TaskOptions) -> TaskFamily:
    evaluation_only("regression", options)
    x, y = _diabetes()
    cut = len(x) * 4 // 5

    def draw(generator: Generator) -> Batch:
        index = torch.randint(cut, (BATCH_SIZE,), generator=generator)
        return x[index], y[index]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    tests = (x[cut:], y[cut:])
    return FixedTask(ModuleTask(build, draw, nn.functional.mse_loss, tests=lambda: tests))


FAMILIES = {"regression": _regression}
