"""One step of the rule `horizon`, compiled and pure, beside Adam's fused step.

python -m benchmarks.kernel_step [--no-pure]      # a table of ratios; a minute on an idle machine
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import in_turns, machine
from benchmarks.step import MILLION, THESIS, mixed, parameters, size_of
from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules.horizon import HorizonRule
from learned_optim.summary import table

#: Shapes, and rounds of which the fastest counts.
NETWORKS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    "784-20-10 network": (THESIS, 1000),
    "66 mixed tensors": (mixed(), 60),
    "one tensor": ([(MILLION,)], 30),
    "one large tensor": ([(10 * MILLION,)], 8),
}
TOTAL_STEPS = 100_000


class Pure(HorizonRule):
    """The rule without its kernel."""

    name = ""
    step_ = HorizonRule.__mro__[1].step_


def kernel_step(rule: HorizonRule, params: list[nn.Parameter]) -> Callable[[], None]:
    """What :class:`LearnedOptimizer` calls once per step, and nothing around it."""
    states = [{"step": torch.zeros(()), **rule.init_state(param)} for param in params]
    grads, shapes = [param.grad for param in params], [param.shape for param in params]

    def run() -> None:
        rule.step_(params, grads, states, total_steps=TOTAL_STEPS, shapes=shapes)

    return run


def subjects(shapes: list[tuple[int, ...]], pure: bool) -> dict[str, Callable[[], Any]]:
    """Steps to compare, each with parameters of its own."""
    rule = HorizonRule().requires_grad_(False)
    found: dict[str, Callable[[], Any]] = {
        "adam": torch.optim.Adam(parameters(shapes), fused=True).step,
        "optimizer": LearnedOptimizer(parameters(shapes), rule, total_steps=TOTAL_STEPS).step,
        "rule": kernel_step(rule, parameters(shapes)),
    }
    if pure:
        optimizer = LearnedOptimizer(parameters(shapes), Pure(), total_steps=TOTAL_STEPS)
        found["pure"] = optimizer.step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-pure", action="store_true", help="leave out the slow pure form")
    pure = not parser.parse_args().no_pure
    print(machine(), kernels.status(), sep="\n")
    rows = []
    for name, (shapes, rounds) in NETWORKS.items():
        for threads in (1, 2):
            best = in_turns(subjects(shapes, pure), rounds, threads)
            adam = best["adam"]
            row = [name, f"{size_of(shapes):,}", str(threads), f"{1e6 * adam:,.0f}"]
            rows.append(row + [f"{best[key] / adam:.2f}" for key in best if key != "adam"])
            print(f"  {name}, threads: {threads}", flush=True)
    header = ["", "coordinates", "threads", "Adam(fused=True), us"]
    header += ["LearnedOptimizer, x Adam", "rule.step_ alone, x"] + ["pure form, x"] * pure
    print(table(header, rows))


if __name__ == "__main__":
    main()
