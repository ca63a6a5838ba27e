"""The thesis's experiment: its LSTM, beside Adam and SGD at their best.

A network of 20 sigmoid units with the thesis's tiny initial weights is trained by the LSTM that was
meta-trained on it. Adam's and SGD's learning rates are chosen by grid search on a seed of their
own; the learned optimizer has nothing to choose.

    python examples/thesis.py                    # scikit-learn's digits, no download
    python examples/thesis.py --dataset mnist    # downloads MNIST through torchvision
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from learned_optim import LearnedOptimizer, load_rule
from learned_optim.meta.data import DataOptions, halves, load_images

LEARNING_RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def load(name: str, data_dir: Path | None) -> tuple[Dataset, Dataset]:
    """Training and test set of flattened images in [0, 1].

    Of MNIST's training images, only the half that no shipped checkpoint was meta-trained on.
    """
    options = DataOptions(data_dir)
    train_images, test_images = (load_images(name, train, options) for train in (True, False))
    if name == "mnist":
        _, train_images = halves(train_images)
    sets = []
    for images in (train_images, test_images):
        x, y = images.batch(torch.arange(len(images)))
        sets.append(TensorDataset(x.flatten(1), y))
    return sets[0], sets[1]


def initialize(model: nn.Module) -> None:
    """The thesis's weights ~ N(0, 0.001^2) and biases 0."""
    for param in model.parameters():
        nn.init.normal_(param, std=0.001) if param.dim() > 1 else nn.init.zeros_(param)


def train(
    make_optimizer: MakeOptimizer, args: argparse.Namespace, data: Dataset, seed: int
) -> tuple[nn.Module, list[float]]:
    """One training run; returns the model and the loss at every step."""
    torch.manual_seed(seed)
    inputs = data[0][0].numel()
    model = nn.Sequential(nn.Linear(inputs, 20), ACTIVATIONS[args.activation](), nn.Linear(20, 10))
    initialize(model)
    # A generator of its own: every optimizer sees the same batches.
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(
        data, replacement=True, num_samples=args.steps * 128, generator=generator
    )
    loader = DataLoader(data, batch_size=128, sampler=sampler)

    # optimizer = torch.optim.Adam(model.parameters(), lr=...)
    optimizer = make_optimizer(model.parameters())

    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of a data set that the model classifies correctly."""
    x, y = data[:]
    return (model(x).argmax(1) == y).float().mean().item()


def tuned(
    make: Callable[[Iterable[Tensor], float], torch.optim.Optimizer],
    args: argparse.Namespace,
    data: Dataset,
) -> float:
    """The learning rate with the smallest summed loss, on a seed that is not used again."""

    def summed(lr: float) -> float:
        total = sum(train(lambda params: make(params, lr), args, data, seed=1000)[1])
        return total if total == total else float("inf")

    return min(LEARNING_RATES, key=summed)


def compare(
    args: argparse.Namespace, data: Dataset, tests: Dataset
) -> dict[str, list[list[float]]]:
    """Tune, train and print a table; returns the loss curves by optimizer."""
    print("tuning Adam's and SGD's learning rates ...", file=sys.stderr)
    adam_lr = tuned(lambda params, lr: torch.optim.Adam(params, lr=lr), args, data)
    sgd_lr = tuned(lambda params, lr: torch.optim.SGD(params, lr=lr), args, data)
    rule = load_rule(args.rule)
    told = {"total_steps": args.steps if rule.reads_horizon else None}
    optimizers: dict[str, MakeOptimizer] = {
        f"LearnedOptimizer({Path(args.rule).stem!r})": lambda p: LearnedOptimizer(p, rule, **told),
        f"Adam(lr={adam_lr:g})": lambda params: torch.optim.Adam(params, lr=adam_lr),
        f"SGD(lr={sgd_lr:g})": lambda params: torch.optim.SGD(params, lr=sgd_lr),
    }
    print(f"{'optimizer':<30}{'summed loss':>12}{'last 10 steps':>15}{'test':>8}")
    curves: dict[str, list[list[float]]] = {}
    for name, make_optimizer in optimizers.items():
        runs = [train(make_optimizer, args, data, seed) for seed in range(args.seeds)]
        curves[name] = [losses for _, losses in runs]
        summed = sum(sum(losses) for losses in curves[name]) / args.seeds
        last = sum(sum(losses[-10:]) / 10 for losses in curves[name]) / args.seeds
        correct = sum(accuracy(model, tests) for model, _ in runs) / args.seeds
        print(f"{name:<30}{summed:>12.1f}{last:>15.3f}{correct:>8.1%}")
    return curves


def plot(curves: dict[str, list[list[float]]], title: str, path: Path) -> None:
    """Mean learning curves on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, runs in curves.items():
        learned = name.startswith("LearnedOptimizer")
        style = {"linestyle": "-", "linewidth": 2} if learned else {"linestyle": "--"}
        axes.plot(torch.tensor(runs).mean(0), label=name, **style)
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title=title)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="sigmoid")
    parser.add_argument("--rule", default="mnist", help="checkpoint of the learned optimizer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("thesis.png"))
    parser.add_argument("--data-dir", type=Path, help="where MNIST is or goes")
    args = parser.parse_args()

    torch.set_num_threads(1)  # networks this small lose time to a second thread
    data, tests = load(args.dataset, args.data_dir)
    print(f"{args.dataset}, {args.steps} steps, mean of {args.seeds} seeds\n")
    plot(compare(args, data, tests), f"{args.dataset}: 20 {args.activation} units", args.plot)
    print(f"\nlearning curves: {args.plot}")


if __name__ == "__main__":
    main()
