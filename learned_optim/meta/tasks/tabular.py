"""Tables: networks with residual blocks, layer norm and dropout (Gorishniy et al. 2021).

scikit-learn's bundled breast cancer data, and its generators of Friedman's regression problem and
of clustered classes; and its 442 diabetes patients on a tanh network of 32 units (``regression``).
A fifth of the rows is held out; columns are standardized.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim._extras import import_extra
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import ModuleTask
from learned_optim.meta.tasks._examples import Examples, standardized
from learned_optim.meta.tasks._registry import EvaluationTask, Horizon, evaluation_tables

BATCH_SIZE = 64


class TabularBlock(nn.Module):
    """``x + dropout(linear(relu(linear(norm(x)))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


def tabular_network(columns: int, outputs: int, width: int = 64) -> nn.Module:
    """A linear layer, two blocks, layer norm and ReLU, and a linear layer."""
    blocks = [TabularBlock(width) for _ in range(2)]
    head = (nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, outputs))
    return nn.Sequential(nn.Linear(columns, width), *blocks, *head)


@lru_cache(maxsize=4)
def _table(name: str) -> tuple[Examples, int]:
    """A table and the number of its classes, 0 for regression."""
    datasets = import_extra("sklearn.datasets")
    if name in ("friedman", "diabetes"):
        if name == "friedman":
            x, y = datasets.make_friedman1(4000, n_features=10, noise=1.0, random_state=0)
        else:
            x, y = datasets.load_diabetes(return_X_y=True)
        target = standardized(torch.tensor(y).float().unsqueeze(1))
        return Examples(standardized(torch.tensor(x).float()), target), 0
    if name == "cancer":
        x, y = datasets.load_breast_cancer(return_X_y=True)
        classes = 2
    else:
        x, y = datasets.make_classification(
            6000, n_features=40, n_informative=12, n_redundant=8, n_classes=5,
            n_clusters_per_class=3, class_sep=1.5, flip_y=0.02, random_state=0,
        )  # fmt: skip
        classes = 5
    return Examples(standardized(torch.tensor(x).float()), torch.tensor(y).long()), classes


def _tabular(name: str, data: DataOptions) -> ModuleTask:
    examples, classes = _table(name)
    train, held_out = examples.split()
    return ModuleTask(
        build=lambda: tabular_network(examples.inputs.shape[1], classes or 1),
        batches=train.batches(BATCH_SIZE),
        criterion=F.cross_entropy if classes else F.mse_loss,
        tests=held_out.all,
    )


def _regression(data: DataOptions) -> ModuleTask:
    train, held_out = _table("diabetes")[0].split()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    return ModuleTask(build, train.batches(BATCH_SIZE), F.mse_loss, tests=held_out.all)


FAMILIES, FIELD = evaluation_tables(
    {
        "tabular-friedman": EvaluationTask(partial(_tabular, "friedman"), Horizon(4000, 800)),
        "tabular-classes": EvaluationTask(partial(_tabular, "classes"), Horizon(4000, 800)),
        "tabular-cancer": EvaluationTask(partial(_tabular, "cancer"), Horizon(1000, 500)),
        "regression": EvaluationTask(_regression, Horizon(1000, 500)),
    }
)
