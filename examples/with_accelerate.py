"""Accelerate: ``prepare`` takes the optimizer like any other.

pip install accelerate && python examples/with_accelerate.py
accelerate launch examples/with_accelerate.py        # on several devices
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer


def main(epochs: int = 5) -> list[float]:
    """Train and return the losses."""
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    data = TensorDataset(x, torch.tensor(digits.target))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    # The length counts the optimizer's steps: those of the prepared loader, on each process.
    loader = accelerator.prepare(DataLoader(data, batch_size=64, shuffle=True))
    optimizer = LearnedOptimizer(model.parameters(), total_steps=epochs * len(loader))
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
