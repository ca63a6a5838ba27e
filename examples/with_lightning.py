"""Lightning: ``configure_optimizers`` returns the optimizer, told the length of the run.

pip install lightning && python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer


class Classifier(lightning.LightningModule):
    """A small network on scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> LearnedOptimizer:
        """The optimizer, and no scheduler."""
        steps = int(self.trainer.estimated_stepping_batches)
        return LearnedOptimizer(self.parameters(), total_steps=steps)


def main(epochs: int = 5) -> list[float]:
    """Train and return the losses."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    data = TensorDataset(x, torch.tensor(digits.target))
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f} in {len(model.losses)} steps")
    return model.losses


if __name__ == "__main__":
    main()
