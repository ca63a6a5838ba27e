"""The learned optimizer, once, beside AdamW at seven learning rates, on three small tasks.

Digits and a table of measurements with two hidden layers, and a character transformer of two blocks
on a text that comes with Python. Every run has the same weights, batches and number of steps. AdamW
has a warm-up and a cosine. The picture shows how many AdamW runs, at learning rates tried in random
order, have a best one as good as the single untuned run.

    python examples/compare_with_adamw.py          # half a minute of one core; no download
"""

import argparse
import pydoc_data.topics
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.evaluation import compare, plot_worth, worth
from learned_optim.evaluation.figures import final_loss
from learned_optim.meta.tasks.language import Transformer

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LENGTH = 32

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of classes, or of the next characters."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def examples(load, size: int):
    """Batches of standardized training examples, and a function that tests on a quarter."""
    bunch = load()
    order = torch.randperm(len(bunch.target), generator=Generator().manual_seed(0))
    x = torch.tensor(bunch.data, dtype=torch.float32)[order]
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    y = torch.tensor(bunch.target)[order]
    held_out = len(y) // 4

    def batches(generator: Generator) -> Batch:
        index = torch.randint(held_out, len(y), (size,), generator=generator)
        return x[index], y[index]

    def test(model: nn.Module) -> dict[str, float]:
        outputs = model(x[:held_out])
        accuracy = (outputs.argmax(1) == y[:held_out]).float().mean().item()
        return {"test loss": F.cross_entropy(outputs, y[:held_out]).item(), "accuracy": accuracy}

    return batches, test


def characters():
    """Batches of a text's first nine tenths, a test on its last, and the number of characters."""
    text = "\n".join(pydoc_data.topics.topics.values())[:200_000]
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(c) for c in text])
    cut = len(tokens) * 9 // 10

    def chunks(starts: Tensor) -> Batch:
        chunk = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
        return chunk[:, :-1], chunk[:, 1:]

    def batches(generator: Generator) -> Batch:
        return chunks(torch.randint(cut - LENGTH, (8,), generator=generator))

    def test(model: nn.Module) -> dict[str, float]:
        starts = torch.arange(cut, len(tokens) - LENGTH, LENGTH)
        return {"test loss": loss(model, chunks(starts)).item()}

    return batches, test, len(alphabet)


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--output", type=Path, default=Path("comparison"))
    args = parser.parse_args()

    digits, test_digits = examples(load_digits, 64)
    table, test_table = examples(load_breast_cancer, 32)
    text, test_text, count = characters()
    tasks = {
        "digits": (lambda: mlp(64, 64, 64, 10), digits, test_digits),
        "table": (lambda: mlp(30, 64, 64, 2), table, test_table),
        "text": (lambda: Transformer(count, width=32, length=LENGTH), text, test_text),
    }
    found = {
        name: compare(
            make_model,
            lambda batches=batches: batches,
            loss,
            args.steps,
            test=test,
            name=name,
            checkpoint=args.checkpoint,
            lrs=LEARNING_RATES,
            output=args.output,
        )
        for name, (make_model, batches, test) in tasks.items()
    }
    for name, comparison in found.items():
        mine = final_loss(comparison.learned)
        best = min(comparison.rivals.values(), key=final_loss)
        verdict = "ahead of" if mine < final_loss(best) else "behind"
        tests = [run.test.get("test loss", float("nan")) for run in (comparison.learned, best)]
        print(
            f"{name}: training loss {verdict} that of AdamW at its best rate, {mine:.3g} to "
            f"{final_loss(best):.3g}; test loss {tests[0]:.3g} to {tests[1]:.3g}"
        )
    value = worth(
        {name: final_loss(c.learned) for name, c in found.items()},
        {name: [final_loss(run) for run in c.rivals.values()] for name, c in found.items()},
    )
    if value is not None:
        equals = f"{value['equals']:.1f}" if value["equals"] else f"more than {len(LEARNING_RATES)}"
        print(f"one untuned run equals the best of {equals} AdamW runs (mean of three tasks)")
        path = args.output / "worth.png"
        plot_worth({args.checkpoint: {"adamw-cosine": {"all": value}}}, path)
        print(f"wrote {path} and a plot of every task beside it")


if __name__ == "__main__":
    main()
