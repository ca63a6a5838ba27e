"""Small data sets, for too many epochs: what weight decay and shorter runs do to held-out losses.

    python -m benchmarks.weight_decay     # two minutes on one core; scikit-learn's data

A perceptron with a hidden layer of 64 units runs 1,500 steps with batches of 32 on half of the
examples, 500 at most, and is held against the other half. Columns are standardized. AdamW at 1e-3,
with its weight decay of 0.01, warms up over 5 % of the run and follows a cosine. Means over five
seeds, which draw split, weights and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import no_options
from learned_optim import LearnedOptimizer
from learned_optim.summary import table

SEEDS, STEPS, BATCH, MOST = 5, 1500, 32, 500


class Variant(NamedTuple):
    """Trained by AdamW, or by `default` with that weight decay, ``None`` for its own."""

    learned: bool
    decay: float | None = None
    steps: int = STEPS

    def __str__(self) -> str:
        if not self.learned:
            return f"AdamW 1e-3, {self.steps:,} steps"
        own = "its own weight decay" if self.decay is None else f"weight_decay={self.decay:g}"
        return f"default, {self.steps:,} steps, {own}"


VARIANTS = (
    Variant(False), Variant(True, 0.0), Variant(True), Variant(True, 10.0), Variant(True, 40.0),
    Variant(True, 0.0, STEPS // 10), Variant(True, None, STEPS // 10),
)  # fmt: skip
SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}


def _load(load: Callable[..., tuple[object, object]], **options: object) -> tuple[Tensor, Tensor]:
    columns, labels = load(**options)
    x = torch.tensor(columns).float()
    return (x - x.mean(0)) / (x.std(0) + 1e-6), torch.tensor(labels)


SETS["digits"] = lambda: _load(datasets.load_digits, return_X_y=True)
SETS["wine"] = lambda: _load(datasets.load_wine, return_X_y=True)
SETS["20 columns, a tenth of the labels wrong"] = lambda: _load(
    datasets.make_classification, n_samples=1000, n_features=20, n_informative=6, n_classes=3,
    flip_y=0.1, random_state=0,
)  # fmt: skip


def run(x: Tensor, y: Tensor, seed: int, variant: Variant) -> tuple[float, float, float]:
    """Training loss over the last twentieth, held-out loss, held-out accuracy.

    Args:
        x: standardized columns, ``(examples, columns)``.
        y: classes, int64, ``(examples,)``.
        seed: of everything random.
        variant: how to train.
    """
    steps = variant.steps
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, held = order[: len(x) // 2][:MOST], order[len(x) // 2 :]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, int(y.max()) + 1))
    optimizer: torch.optim.Optimizer
    if variant.learned:
        optimizer = LearnedOptimizer(
            model.parameters(), total_steps=steps, weight_decay=variant.decay
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine)
    losses = []
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        if not variant.learned:
            scheduler.step()
        losses.append(loss.item())
    with torch.no_grad():
        out = model(x[held])
        accuracy = (out.argmax(1) == y[held]).double().mean().item()
    last = losses[-(steps // 20) :]
    return sum(last) / len(last), cross_entropy(out, y[held]).item(), accuracy


def _warm_up_and_cosine(step: int) -> float:
    return min(1.0, (step + 1) / (0.05 * STEPS)) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def main() -> None:
    """Print the table."""
    rows = []
    for name, load in SETS.items():
        x, y = load()
        for variant in VARIANTS:
            found = torch.tensor([run(x, y, seed, variant) for seed in range(SEEDS)])
            mean, deviation = found.mean(0).tolist(), found.std(0).tolist()
            rows.append([
                name,
                str(variant),
                f"{mean[0]:.2g}",
                f"{mean[1]:.3f} ± {deviation[1]:.3f}",
                f"{mean[2]:.1%} ± {deviation[2]:.1%}",
            ])  # fmt: skip
    columns = ["examples", "optimizer", "training loss", "held-out loss", "held-out accuracy"]
    print(table(columns, rows))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
