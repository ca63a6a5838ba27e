"""Meta-train an optimizer for a network of your own, and see whether it was worth it.

The network below has batch norm and dropout, and its images are shifted at random: none of that
needs any care. On half of scikit-learn's digits, an update rule is meta-trained for it (about four
minutes of one core; a second start goes on where the first stopped). On the other half, it is
compared with a rule that ships, and with Adam and AdamW, whose learning rates are tuned, from the
same weights on the same batches. Then it takes Adam's place in an ordinary training loop.

    python examples/meta_train_your_own.py
    python examples/meta_train_your_own.py --push user/repo    # shares it on the Hugging Face Hub
"""

import argparse
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from learned_optim import LearnedOptimizer, push_to_hub
from learned_optim.evaluation import EvaluateConfig, Evaluation, brief
from learned_optim.meta import ModuleTask, meta_train


class Network(nn.Module):
    """A small convolutional network: 1,946 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class ShiftedDigits(Dataset):
    """Images of 8 x 8 pixels, shifted by up to one pixel, and their classes."""

    def __init__(self, first: int, last: int) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[first:last], dtype=torch.float32) / 16
        self.classes = torch.tensor(digits.target[first:last])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll((down, right), (0, 1)).unsqueeze(0), self.classes[index]


def task(first: int, last: int) -> ModuleTask:
    """The training of such a network on some of the digits."""
    loader = DataLoader(ShiftedDigits(first, last), batch_size=64, shuffle=True, drop_last=True)
    return ModuleTask(Network, loader, nn.functional.cross_entropy)


def train(rule: Path, steps: int) -> float:
    """An ordinary training loop; returns the mean loss of its last ten steps."""
    torch.manual_seed(0)
    model = Network()
    loader = DataLoader(ShiftedDigits(900, 1797), batch_size=64, shuffle=True, drop_last=True)

    # optimizer = torch.optim.Adam(model.parameters(), lr=...)
    optimizer = LearnedOptimizer(model.parameters(), rule)

    losses: list[float] = []
    while len(losses) < steps:
        for images, classes in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/my-optimizer"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--runs-per-epoch", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="length of every training")
    parser.add_argument("--seeds", type=int, default=3, help="test seeds of the comparison")
    parser.add_argument("--push", metavar="USER/REPO", help="upload to the Hugging Face Hub")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks this small lose time to a second thread

    trained = meta_train(
        task(0, 900),
        folder=args.folder,
        test_tasks=task(900, 1797),
        epochs=args.epochs,
        runs_per_epoch=args.runs_per_epoch,
        horizon=args.steps,
        test_runs=10,
        against_adamw=False,  # it is tuned and compared with below, on other data
    )
    print(f"saved: {trained.path}")
    print("tuning Adam and AdamW, and comparing ...", file=sys.stderr)

    config = EvaluateConfig(
        checkpoints=(str(trained.path), "coordinatewise"),  # and one that ships, of the same rule
        tasks=("network",),
        baselines=("adam", "adamw"),
        steps=args.steps,
        seeds=args.seeds,
        tuning_seeds=1,
        output=args.folder / "evaluation",
    )
    summary = Evaluation(config, tasks={"network": task(900, 1797)}).execute()
    print(f"\n{brief(summary)}")

    loss = train(trained.path, args.steps)
    print(f"in a training loop of {args.steps} steps: loss {loss:.3f} over the last ten")
    if args.push:
        print(push_to_hub(trained.path, args.push, evaluation=summary))


if __name__ == "__main__":
    main()
