"""Fine-tuning: a network trained on digits learns ones that are shifted by a pixel, from a few.

    python examples/fine_tuning.py

Steps at lr=1 are those of networks from scratch, and undo some of what was trained. lr=0.1 makes
them a tenth as long. AdamW runs beside it, at a rate that learns as much and at one that keeps
more.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from learned_optim import LearnedOptimizer

EXAMPLES = 200  # of shifted digits to learn from


def learned(params: Iterable[Tensor], lr: float, steps: int) -> tuple[LearnedOptimizer, None]:
    """The learned optimizer, which anneals by itself."""
    return LearnedOptimizer(params, lr=lr, total_steps=steps), None


def adamw(
    params: Iterable[Tensor], lr: float, steps: int
) -> tuple[torch.optim.AdamW, CosineAnnealingLR]:
    """AdamW, and its scheduler."""
    optimizer = torch.optim.AdamW(params, lr=lr)
    return optimizer, CosineAnnealingLR(optimizer, steps)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, make=learned, lr: float = 1) -> None:
    """Train on random batches of 32."""
    generator = torch.Generator().manual_seed(0)
    optimizer, scheduler = make(model.parameters(), lr, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return (model(x).argmax(1) == y).float().mean().item()


def main(steps: int = 100) -> dict[str, tuple[float, float]]:
    """Train, fine-tune in four ways, and print accuracies on shifted and on original digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    x, shifted = (pixels.flatten(1) for pixels in (images, images.roll(1, dims=2)))
    few, rest = slice(EXAMPLES), slice(EXAMPLES, None)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def accuracies() -> tuple[float, float]:
        return accuracy(model, shifted[rest], y[rest]), accuracy(model, x, y)

    train(model, x, y, 3 * steps)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    found = {"before": accuracies()}
    for make, lr in ((learned, 1.0), (learned, 0.1), (adamw, 3e-2), (adamw, 3e-3)):
        model.load_state_dict(trained)
        train(model, shifted[few], y[few], steps, make, lr)
        found[f"{make.__name__}, lr={lr:g}"] = accuracies()
    for what, (on_shifted, on_original) in found.items():
        print(f"{what:<16} shifted {on_shifted:.3f}, original {on_original:.3f}")
    return found


if __name__ == "__main__":
    main()
