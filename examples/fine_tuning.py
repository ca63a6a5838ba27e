"""Fine-tuning: a network trained on digits learns ones that are shifted by a pixel, from a few.

    python examples/fine_tuning.py

Updates at lr=1 are those of networks from scratch, and undo some of what was trained. lr=0.1 makes
them a tenth as large; total_steps makes them anneal in both cases.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from learned_optim import LearnedOptimizer

EXAMPLES = 200  # of shifted digits to learn from


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, generator: torch.Generator
) -> None:
    """Train on random batches of 32."""
    optimizer = LearnedOptimizer(model.parameters(), lr=lr, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return (model(x).argmax(1) == y).float().mean().item()


def main(steps: int = 100) -> dict[str, float]:
    """Train, fine-tune at two multipliers, and print the accuracies."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    x, shifted = (pixels.flatten(1) for pixels in (images, images.roll(1, dims=2)))
    few, rest = slice(EXAMPLES), slice(EXAMPLES, None)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, x, y, 3 * steps, 1.0, generator)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    found = {"before: original": accuracy(model, x, y)}
    found["before: shifted"] = accuracy(model, shifted[rest], y[rest])
    for lr in (1.0, 0.1):
        model.load_state_dict(trained)
        train(model, shifted[few], y[few], steps, lr, generator)
        found[f"lr={lr}: shifted"] = accuracy(model, shifted[rest], y[rest])
        found[f"lr={lr}: original"] = accuracy(model, x, y)
    for what, share in found.items():
        print(f"{what:<18} {share:.3f}")
    return found


if __name__ == "__main__":
    main()
