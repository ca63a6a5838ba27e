"""Steps of rules with a network per coordinate, with the compiled step of LSTM stacks and without.

python -m benchmarks lstm-kernel         # for docs/performance.md
python -m benchmarks.lstm_kernel         # prints what the size of blocks costs (docs/design.md)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks import no_options
from benchmarks.measure import in_turns, machine
from benchmarks.step import MILLION, THESIS, fresh, mixed, parameters, size_of
from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules import UpdateRule, _pieces, build_rule
from learned_optim.rules._lstm import LSTMStack
from learned_optim.summary import table

#: Shapes, and rounds of which the fastest counts.
NETWORKS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    "784-20-10 network": (THESIS, 30),
    "66 mixed tensors": (mixed(), 3),
    "one tensor": ([(MILLION,)], 3),
}


def rules() -> dict[str, UpdateRule]:
    """The thesis's network, and that of `coordinatewise`, with weights that were never trained."""
    units = {"hidden_size": 16, "slow_beta": 0.99, "square_beta": 0.99, "direct": True}
    return {
        "lstm, 2 x 20 units": fresh("lstm"),
        "equivariant, 16 units": build_rule("equivariant", units),
    }


def measure() -> dict[str, Any]:
    """Nanoseconds per coordinate of one step, by rule and network."""
    found = []
    for name, (shapes, rounds) in NETWORKS.items():
        subjects: dict[str, Callable[[], object]] = {}
        for rule, weights in rules().items():
            subjects[f"{rule}: compiled"] = LearnedOptimizer(parameters(shapes), weights).step
            pure = LearnedOptimizer(parameters(shapes), weights).step
            subjects[f"{rule}: pure"] = without_kernel(pure)
            subjects[f"{rule}: alone"] = network_alone(weights, size_of(shapes))
        best, n = in_turns(subjects, rounds), size_of(shapes)
        for rule in rules():
            row = {
                k: round(1e9 * best[f"{rule}: {k}"] / n, 2) for k in ("compiled", "pure", "alone")
            }
            found.append({"rule": rule, "network": name, "coordinates": n, **row})
            print(f"  {found[-1]}", flush=True)
    return {"library": kernels.status().partition(":")[0], "rows": found}


def network_alone(rule: UpdateRule, n: int) -> Callable[[], None]:
    """The compiled step of the rule's stack alone, in the blocks of its own step."""
    stack, state = rule.lstm, rule.init_state(torch.zeros(n))
    assert isinstance(stack, LSTMStack)
    features = torch.randn(stack.weight_ih_l0.shape[1], n).t()

    def run() -> None:
        for start in range(0, n, _pieces.BLOCK):
            rows = slice(start, start + _pieces.BLOCK)
            stack.step_(features[rows], {key: state[key][rows] for key in LSTMStack.STATE})

    return run


def without_kernel(step: Callable[[], object]) -> Callable[[], object]:
    """The same step by the pure form."""

    def run() -> None:
        with mock.patch.object(kernels, "lstm_step_", return_value=False):
            step()

    return run


def block_sizes(n: int = 200_000, rounds: int = 8) -> dict[str, float]:
    """Nanoseconds per coordinate of one tensor, by rule, size of blocks, and kernel or not."""
    subjects: dict[str, Callable[[], object]] = {}
    for rule, weights in rules().items():
        for block in (1 << 13, 1 << 15):
            step = in_blocks(LearnedOptimizer(parameters([(n,)]), weights).step, block)
            subjects[f"{rule}, blocks of {block}, compiled"] = step
            step = in_blocks(LearnedOptimizer(parameters([(n,)]), weights).step, block)
            subjects[f"{rule}, blocks of {block}, pure"] = without_kernel(step)
    return {name: round(1e9 * s / n, 1) for name, s in in_turns(subjects, rounds).items()}


def in_blocks(step: Callable[[], object], block: int) -> Callable[[], object]:
    """The same step in other blocks."""

    def run() -> None:
        _pieces._remembered_pieces.cache_clear()
        with mock.patch.object(_pieces, "BLOCK", block):
            step()
        _pieces._remembered_pieces.cache_clear()

    return run


def markdown(found: dict[str, Any]) -> str:
    """The table of the page."""
    rows = [
        [row["rule"], row["network"], f"{row['coordinates']:,}", f"{row['pure']:,.0f}",
         f"{row['compiled']:,.0f}", f"{row['compiled'] / row['pure']:.2f}",
         f"{row['alone']:,.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = [
        "rule",
        "",
        "coordinates",
        "pure form, ns",
        "compiled, ns",
        "compiled / pure form",
        "the compiled part alone, ns",
    ]
    return table(head, rows)


if __name__ == "__main__":
    no_options.parse(__doc__)
    print(machine(), *block_sizes().items(), sep="\n")
