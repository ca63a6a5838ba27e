"""How the trust of `general-4` grows: fresh networks beside trained ones.

    python -m benchmarks.trust        # seconds; scikit-learn's digits

A 64-128-128-10 perceptron, fresh and after 600 steps of AdamW at 1e-3, goes on for a hundred steps
without being told their number. Per matrix: the mean cosine between a gradient and the momentum
before it over the first ten steps, and the step after which the trust is whole. Five seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import no_options
from learned_optim import LearnedOptimizer
from learned_optim.rules import _history as history
from learned_optim.summary import table

SEEDS, STEPS, FIRST = 5, 100, 10


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(x), (size,), generator=generator)
        yield x[index], y[index]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> Iterator[int]:
    """Trains without end, and stops after every step."""
    for step, (x, y) in enumerate(batches(size, seed), start=1):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        yield step


def watch(trained: bool, size: int, seed: int) -> tuple[list[float], list[float]]:
    """Per matrix, the mean cosine and the step at which the trust is whole, or infinity."""
    torch.manual_seed(seed)
    model = network()
    if trained:
        for step in fit(model, torch.optim.AdamW(model.parameters(), 1e-3), 64, 100 + seed):
            if step == 600:
                break
    optimizer = LearnedOptimizer(model.parameters(), "general-4")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    whole, cosines = [math.inf] * len(matrices), [0.0] * len(matrices)
    for step in fit(model, optimizer, size, seed):
        for index, param in enumerate(matrices):
            stats = optimizer.state[param]["stats"][0]
            if stats[history.TRUST] >= 0:
                whole[index] = min(whole[index], step)
            if step == FIRST:  # the mean over a hundred steps, without its bias
                share = 1 - 0.99**step
                cosines[index] = stats[history.MEAN_CORRELATION].item() / share
        if step == STEPS:
            break
    return cosines, whole


def main() -> None:
    """Prints the table."""
    rows = []
    for trained in (False, True):
        for size in (8, 64):
            found = [watch(trained, size, seed) for seed in range(SEEDS)]
            cosines = [cosine for each, _ in found for cosine in each]
            whole = sorted(step for _, each in found for step in each)
            middle = whole[len(whole) // 2]
            rows.append(
                [
                    f"{'trained' if trained else 'fresh'}, batches of {size}",
                    f"{sum(cosines) / len(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f})",
                    f"{middle:.0f}" if math.isfinite(middle) else "never",
                    f"{sum(map(math.isfinite, whole))} of {len(whole)}",
                ]
            )
    head = ["", "mean cosine, first 10 steps (range)", "trust whole after, median", f"of {STEPS}"]
    print(table(head, rows))


if __name__ == "__main__":
    no_options.parse(__doc__)
    main()
