"""Regression on scikit-learn's bundled diabetes data: 10 standardized inputs, one output.

A 10-32-1 tanh network in PyTorch's initialization on the mean squared error; a fifth of the 442
patients is held out.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from learned_optim._extras import how_to_install
from learned_optim.meta.tasks._base import (
    FixedTask,
    Horizon,
    ModuleTask,
    TaskFamily,
    TaskOptions,
    evaluation_only,
)
from learned_optim.meta.tasks._examples import Examples, standardized

BATCH_SIZE = 64


@lru_cache(maxsize=1)
def _diabetes() -> Examples:
    """Inputs ``(442, 10)`` and targets ``(442, 1)``, standardized."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ImportError(
            f"the regression data comes with scikit-learn: {how_to_install('meta')}"
        ) from error
    inputs, targets = load_diabetes(return_X_y=True)
    x, y = torch.tensor(inputs).float(), torch.tensor(targets).float().unsqueeze(1)
    return Examples(standardized(x), standardized(y))


def _regression(options: TaskOptions) -> TaskFamily:
    evaluation_only("regression", options)
    train, held_out = _diabetes().split()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    criterion = nn.functional.mse_loss
    return FixedTask(ModuleTask(build, train.batches(BATCH_SIZE), criterion, tests=held_out.all))


FAMILIES = {"regression": _regression}
FIELD = {"regression": Horizon(1000, 500)}
