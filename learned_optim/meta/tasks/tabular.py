"""Tables: networks with residual blocks, layer norm and dropout (Gorishniy et al. 2021).

scikit-learn's bundled breast cancer data, and its generators of Friedman's regression problem and
of clustered classes; and its 442 diabetes patients on a tanh network of 32 units (``regression``).
A fifth of the rows is held out; columns are standardized.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim._extras import import_extra
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks._base import EvaluationTask, ModuleTask
from learned_optim.meta.tasks._examples import Examples, standardized

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


def tanh_network(columns: int, outputs: int) -> nn.Module:
    """A tanh layer of 32 units and a linear layer."""
    return nn.Sequential(nn.Linear(columns, 32), nn.Tanh(), nn.Linear(32, outputs))


@lru_cache(maxsize=4)
def _table(name: str) -> tuple[Examples, int]:
    """A table and the number of its classes, 0 for regression."""
    datasets = import_extra("sklearn.datasets")
    if name == "friedman":
        x, y = datasets.make_friedman1(4000, n_features=10, noise=1.0, random_state=0)
    elif name == "classes":
        x, y = datasets.make_classification(
            6000, n_features=40, n_informative=12, n_redundant=8, n_classes=5,
            n_clusters_per_class=3, class_sep=1.5, flip_y=0.02, random_state=0,
        )  # fmt: skip
    else:
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = {"breast_cancer": 2, "classes": 5}.get(name, 0)
    targets = torch.tensor(y)
    targets = targets.long() if classes else standardized(targets.float().unsqueeze(1))
    return Examples(standardized(torch.tensor(x).float()), targets), classes


def _tabular(
    name: str, data: DataOptions, build: Callable[[int, int], nn.Module] = tabular_network
) -> ModuleTask:
    examples, classes = _table(name)
    network = partial(build, examples.inputs.shape[1], classes or 1)
    return examples.task(network, BATCH_SIZE, F.cross_entropy if classes else F.mse_loss)


FAMILIES = {
    "tabular-friedman": EvaluationTask(partial(_tabular, "friedman"), steps=4000, quick=800),
    "tabular-classes": EvaluationTask(partial(_tabular, "classes"), steps=4000, quick=800),
    "tabular-cancer": EvaluationTask(partial(_tabular, "breast_cancer"), steps=1000, quick=500),
    "regression": EvaluationTask(
        partial(_tabular, "diabetes", build=tanh_network), steps=1000, quick=500
    ),
}
