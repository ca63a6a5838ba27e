"""What the eigenbasis costs: microseconds by shape, and its share of a step of known networks.

    python -m benchmarks cost        # a minute; writes docs/performance/cost.json

Shapes are measured on one thread, as means over the steps between two refreshes of an old basis.
Networks are predicted from the rates of the largest square matrix: products and refreshes by
their floating point operations, what remains of a step by the number of coordinates. Their
gradients are taken to run at the rate of its float32 products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import PERFORMANCE, machine, parameters, save
from benchmarks.memory import MODELS
from learned_optim import LearnedOptimizer
from learned_optim.pretrained import ALIASES
from learned_optim.rules import _basis as basis
from learned_optim.summary import table

OUTPUT = PERFORMANCE / "cost.json"
SHAPES = ((64, 64), (256, 64), (256, 256), (1024, 256), (1024, 1024), (4096, 1024))
OLD = 1024  # gradients that a basis has seen: refreshes are as rare as they become

#: Usual batches, and the operations of gradients per example, those of three forward passes.
BATCHES = {
    "ResNet-50": (256, "images", 3 * 8.2e9),
    "ViT-B/16": (1024, "images", 3 * 35.1e9),
    "GPT-2": (524_288, "tokens", 6 * 124e6),
    "decoder": (1_048_576, "tokens", 6 * 1236e6),
}


def mean_seconds(run: Callable[[], object], rounds: int) -> float:
    """Returns processor seconds of a call, after one to warm up."""
    run()
    started = time.thread_time()
    for _ in range(rounds):
        run()
    return (time.thread_time() - started) / rounds


def parts(rows: int, columns: int) -> dict[str, float]:
    """Returns seconds per step of the parts of a step of one matrix, and of whole steps."""
    (param,) = params = parameters([(rows, columns)])
    grad = param.grad
    assert grad is not None
    optimizer = LearnedOptimizer(params, ALIASES["default"], total_steps=10**5)
    optimizer.step()
    optimizer.state[param]["basis_age"].fill_(OLD)
    rotated = basis.rotated_sides(grad.shape)
    state = basis.init_bases(grad.shape, rotated, grad.dtype, grad.device)
    left, right = state.get("row_basis"), state.get("col_basis")
    sides = [
        (state[f"{name}_basis"], state[f"{name}_cov"].unsqueeze(0), factor.unsqueeze(0))
        for name, factor in (("row", grad), ("col", grad.mT))
        if f"{name}_basis" in state
    ]

    def covariances() -> None:
        for _, cov, factor in sides:
            basis.accumulate_(cov, factor, [0])

    def refresh() -> None:
        for own, cov, _ in sides:
            basis.next_basis(own, cov)

    period = basis.LONGEST_PERIOD
    muon = torch.optim.Muon(parameters([(rows, columns)]))
    adam = torch.optim.Adam(parameters([(rows, columns)]), fused=True)
    return {
        "gradients": mean_seconds(lambda: basis.rotate_grad(grad, left, right), period),
        "covariances": mean_seconds(covariances, period // 4) * basis.WINDOW / period,
        "updates": mean_seconds(
            lambda: basis.rotate_back(grad, left, right, basis.rounded_product), period
        ),
        "refreshes": mean_seconds(refresh, 2) / period,
        "whole step": mean_seconds(optimizer.step, period),
        "Muon": mean_seconds(muon.step, period // 4),
        "Adam": mean_seconds(adam.step, period),
    }


def operations(shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns the operations of one product with each rotated side, and of its refreshes."""
    products = refreshes = 0.0
    if len(shape) > 1:
        size = torch.Size(shape).numel()
        for side, rotated in zip(
            basis.matrix_shape(shape), basis.rotated_sides(shape), strict=True
        ):
            products += 2.0 * side * size if rotated else 0.0
            refreshes += side**3 if rotated else 0.0
    return products, refreshes


def measure() -> dict[str, Any]:
    """Returns seconds by shape, and the predicted ones of networks."""
    shapes = {f"{rows} x {columns}": parts(rows, columns) for rows, columns in SHAPES}
    largest = (1024, 1024)
    known = shapes["1024 x 1024"]
    products, refreshes = operations(largest)
    multiplied = known["gradients"] + known["covariances"] + known["updates"]
    rest = known["whole step"] - multiplied - known["refreshes"]
    networks = {}
    for name, build in MODELS.items():
        seconds = 0.0
        for tensor in build():
            of_products, of_refreshes = operations(tensor.shape)
            seconds += of_products / products * multiplied
            seconds += of_refreshes / refreshes * known["refreshes"]
            seconds += tensor.size / torch.Size(largest).numel() * rest
        size, _, per_example = BATCHES[name]
        gradients = size * per_example * known["gradients"] / products
        networks[name] = {"seconds": seconds, "share": seconds / gradients}
    return {"machine": machine(), "shapes": shapes, "networks": networks}


def shape_table(found: dict[str, Any]) -> str:
    """Returns the table of shapes, Markdown."""
    names = list(next(iter(found["shapes"].values())))
    rows = [
        [shape, *(f"{1e6 * row[name]:,.0f}" for name in names)]
        for shape, row in found["shapes"].items()
    ]
    return table(["µs per step", *names], rows)


def network_table(found: dict[str, Any]) -> str:
    """Returns the table of networks, Markdown."""
    rows = []
    for name, row in found["networks"].items():
        size, unit, _ = BATCHES[name]
        cells = [name, f"{size:,} {unit}", f"{100 * row['share']:.2f} %"]
        rows.append([*cells, f"{size * row['share'] / 0.1:,.0f}"])
    return table(["network", "batch", "optimizer / gradients", "a tenth at a batch of"], rows)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = save(OUTPUT, measure())
    print(shape_table(found), network_table(found), sep="\n\n")
