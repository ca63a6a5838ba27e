"""Shipped checkpoints keep their updates: 200 steps on three networks, pinned.

``python tests/test_pinned_checkpoints.py`` writes the pins anew. They hold, after steps 1, 10, 50
and 200 in float64 and after 1 and 10 in float32, the norm of every parameter and its product with a
fixed vector; of rules that read the length of the run, with and without it. A trained rule
amplifies rounding, in which processors differ: tolerances grow with the steps, and the float32 pins
end early.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, list_pretrained, load_rule
from learned_optim.pretrained import ALIASES

FILE = Path(__file__).parent / "pins" / "checkpoints.json"
CHECKPOINTS = [name for name in list_pretrained() if name not in ALIASES]
STEPS = 200
#: dtype, and steps at which parameters are compared, with tolerances.
RUNS = {
    "float64": (torch.float64, {1: 1e-12, 10: 1e-10, 50: 1e-9, STEPS: 1e-6}),
    "float32": (torch.float32, {1: 1e-5, 10: 1e-3}),
}


class Tokens(nn.Module):
    """Embedding, recurrence, normalization and a scalar: tensors of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.cell = nn.GRU(6, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 4).long().remainder(12)
        return self.head(self.norm(self.cell(self.table(tokens))[0][:, -1])) * self.temperature


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(16, 12), nn.Sigmoid(), nn.Linear(12, 4)),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 3, 3, bias=False),  # before a normalization its gradient would be rounding
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
    ),
    "tokens": Tokens,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(11)
    model = NETWORKS[name]()
    if name == "perceptron":  # the published notebook's small initialization
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.01)
    return model


def cases() -> list[tuple[str, str, str, int | None]]:
    """Checkpoint, network, run and length told to the rule."""
    return [
        (checkpoint, name, run, told)
        for checkpoint in CHECKPOINTS
        for name in NETWORKS
        for run in RUNS
        # In float32 the bases differ too much between processors to pin anything.
        if (checkpoint, run) != ("eigenbasis", "float32")
        for told in ((None, STEPS) if load_rule(checkpoint).reads_horizon else (None,))
    ]


def key(checkpoint: str, name: str, run: str, told: int | None) -> str:
    return "/".join((checkpoint, name, run, *([f"of {told}"] if told else [])))


def trajectory(checkpoint: str, name: str, run: str, told: int | None) -> list[list[float]]:
    """Norms and products of all parameters after each of the steps that are compared."""
    dtype, stops = RUNS[run]
    model = network(name).to(dtype)
    rule = load_rule(checkpoint).to(dtype)
    optimizer = LearnedOptimizer(model.parameters(), rule, warmup=0, total_steps=told)
    generator = torch.Generator().manual_seed(5)
    numbers = []
    for step in range(1, max(stops) + 1):
        x = torch.rand(32, 16, generator=generator, dtype=torch.float64).to(dtype)
        y = x[:, :4].argmax(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step in stops:
            numbers.append([v for p in model.parameters() for v in projections(p.detach())])
    return numbers


def projections(param: Tensor) -> tuple[float, float]:
    flat = param.double().flatten()
    wave = torch.linspace(0.0, 7.0, len(flat), dtype=torch.float64).cos()
    return float(flat.norm()), float(flat @ wave)


@pytest.mark.filterwarnings("ignore:step .* is past the")  # of the thesis's checkpoints
@pytest.mark.parametrize("case", cases(), ids=lambda case: key(*case))
def test_updates_are_the_pinned_ones(case: tuple[str, str, str, int | None]) -> None:
    run, expected = case[2], json.loads(FILE.read_text())[key(*case)]
    # Bases are found by LAPACK, which every processor rounds in its own way.
    slack = 1e3 if case[0] == "eigenbasis" else 1.0
    tolerances = [slack * tolerance for tolerance in RUNS[run][1].values()]
    for actual, pinned, tolerance in zip(trajectory(*case), expected, tolerances, strict=True):
        assert actual == pytest.approx(pinned, rel=tolerance, abs=tolerance)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pins = {key(*case): trajectory(*case) for case in cases()}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(
        "{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in pins.items()) + "\n}\n"
    )
