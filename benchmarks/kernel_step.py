"""One step of the rule `horizon`, compiled and pure, beside Adam's fused step.

python -m benchmarks kernel-step         # for docs/performance.md; a minute on an idle machine
python -m benchmarks.kernel_step         # prints the tables alone
python -m benchmarks.kernel_step small   # the 784-20-10 network alone, in a second
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.measure import in_turns, machine
from benchmarks.step import MILLION, THESIS, mixed, parameters, size_of
from learned_optim import LearnedOptimizer, kernels
from learned_optim.kernels import _cpu
from learned_optim.kernels._call import StepSettings, StepTensors
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonRule
from learned_optim.summary import table

#: Shapes, and rounds of which the fastest counts.
NETWORKS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    "784-20-10 network": (THESIS, 1000),
    "66 mixed tensors": (mixed(), 60),
    "one tensor": ([(MILLION,)], 30),
    "one large tensor": ([(10 * MILLION,)], 3),
}
TOTAL_STEPS = 100_000


class Pure(HorizonRule):
    """The rule without its kernel."""

    name = ""
    step_ = UpdateRule.step_


class Unbound(HorizonRule):
    """The rule whose kernel looks at every tensor in every step."""

    name = ""

    def bind_step(self, *_: object) -> None:
        """None: see :meth:`UpdateRule.bind_step`."""


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


def measure() -> dict[str, Any]:
    """Seconds of the steps by network and number of threads, and what one per parameter costs."""
    rows = []
    for name, (shapes, rounds) in NETWORKS.items():
        for threads in (1, 2):
            best = in_turns(subjects(shapes, pure=True), rounds, threads)
            rows.append({"name": name, "size": size_of(shapes), "threads": threads, **best})
            print(f"  {name}, threads: {threads}", flush=True)
    return {
        "library": kernels.status().partition(":")[0],
        "rows": rows,
        "many": one_each(),
        "parts": parts(),
    }


def parts() -> dict[str, float]:
    """Where a step of the 784-20-10 network spends its time: seconds on one thread.

    Returns:
        By what is called: Adam's fused step, the optimizer's step, that of its group alone, the
        compiled library alone, and a step of ``torch.optim`` that does nothing.
    """
    rule = HorizonRule().requires_grad_(False)
    optimizer = LearnedOptimizer(parameters(THESIS), rule, total_steps=TOTAL_STEPS)
    optimizer.step()  # binds
    (group,) = optimizer.param_groups
    bound = optimizer._bound[0]
    assert bound is not None
    return in_turns(
        {
            "adam": torch.optim.Adam(parameters(THESIS), fused=True).step,
            "optimizer": optimizer.step,
            "group": lambda: bound.step_(optimizer, group),
            "library": library_call(rule, parameters(THESIS)),
            "wrapper": Idle(parameters(THESIS), {}).step,
        },
        3000,
    )


class Idle(torch.optim.Optimizer):
    """Nothing but what torch puts around every optimizer's step."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing."""


def library_call(rule: HorizonRule, params: list[nn.Parameter]) -> Callable[[], object]:
    """The compiled step with all of its arguments prepared: no check of any tensor."""
    states = [{"step": torch.zeros(()), **rule.init_state(param)} for param in params]
    grads = [param.grad for param in params if param.grad is not None]
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> int:
        calls.append(arguments)
        return 0

    tensors = StepTensors(rule._network(), params, (), states)
    bound = _cpu.bind(tensors, rule.config.largest_scale)
    assert bound is not None
    step, bound._step = bound._step, record  # type: ignore[assignment]
    assert bound.run_first(grads, StepSettings(rule.kernel_config(), total_steps=TOTAL_STEPS))
    ((*pointers, _, threads),) = calls
    settings = (1.0, 1.0, 0.0, TOTAL_STEPS, 0, rule.config.hidden_size)
    numbers = array("d", (*settings, rule.hidden.in_features, *rule.kernel_config()))

    def call(kept: object = (bound, grads, numbers)) -> object:
        return step(*pointers, numbers.buffer_info()[0], threads)

    return call


def one_each() -> dict[str, float]:
    """Seconds per optimizer to build one for each of 66 tensors, and to step all of them."""
    shapes, rule = mixed(), HorizonRule().requires_grad_(False)
    apart, together, adam = parameters(shapes), parameters(shapes), parameters(shapes)

    def adam_of(params: list[nn.Parameter]) -> Callable[[], object]:
        return torch.optim.Adam(params, fused=True).step

    def learned(params: list[nn.Parameter]) -> Callable[[], object]:
        return LearnedOptimizer(params, rule).step

    def each(steps: list[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            for step in steps:
                step()

        return run

    builds: dict[str, Callable[[], object]] = {
        f"build {name}": lambda make=make: [make([p]) for p in apart]  # type: ignore[misc]
        for name, make in (("learned", learned), ("adam", adam_of))
    }
    built = {name: s / len(shapes) for name, s in in_turns(builds, 20).items()}
    steps = {
        "step learned": learned(together),
        "step learned each": each([learned([p]) for p in apart]),
        "step adam": adam_of(adam),
        "step adam each": each([adam_of([p]) for p in adam]),
    }
    return built | in_turns(steps, 60)


def in_graphs() -> dict[str, float]:
    """Seconds of ``torch.compile``d steps on the 784-20-10 network, and of the eager ones."""
    rule, adam = HorizonRule().requires_grad_(False), torch.optim.Adam
    learned = [LearnedOptimizer(parameters(THESIS), r, total_steps=TOTAL_STEPS).step
               for r in (rule, rule, Pure())]  # fmt: skip
    found: dict[str, Callable[[], Any]] = {
        "adam": adam(parameters(THESIS), fused=True).step,
        "eager": learned[0],
        "graph": torch.compile(learned[1], fullgraph=True),
        "pure graph": torch.compile(learned[2], fullgraph=True),
    }
    for step in found.values():  # traces
        step()
        step()
    return in_turns(found, 300)


def small() -> dict[str, float]:
    """Steps of the 784-20-10 network on one thread, in units of Adam's fused one."""
    found = subjects(THESIS, pure=False)
    optimizer = LearnedOptimizer(parameters(THESIS), Unbound(), total_steps=TOTAL_STEPS)
    best = in_turns(found | {"unbound": optimizer.step}, 3000)
    return {name: seconds / best["adam"] for name, seconds in best.items()}


def markdown(found: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = [
        [
            row["name"],
            f"{row['size']:,}",
            str(row["threads"]),
            f"{1e6 * row['adam']:,.0f}",
            *(f"{row[key] / row['adam']:.2f}" for key in ("optimizer", "rule", "pure")),
        ]
        for row in found["rows"]
    ]
    header = ["", "coordinates", "threads", "Adam(fused=True), microseconds"]
    header += ["`LearnedOptimizer`, times Adam", "`rule.step_` alone", "pure form"]
    many = found["many"]
    apart = [
        [
            name,
            f"{1e6 * many[f'build {key}']:,.0f}",
            f"{1e3 * many[f'step {key}']:.2f}",
            f"{1e3 * many[f'step {key} each']:.2f}",
        ]
        for name, key in (("`LearnedOptimizer`", "learned"), ("Adam(fused=True)", "adam"))
    ]
    columns = ["66 tensors", "building one, microseconds", "step of one for all, milliseconds"]
    parts = found["parts"]
    named = (
        ("`LearnedOptimizer.step`", "optimizer"),
        ("its group's step: the same tensors as before?", "group"),
        ("the compiled library alone", "library"),
        ("what torch puts around every optimizer's step", "wrapper"),
        ("Adam(fused=True)", "adam"),
    )
    spent = [
        [name, f"{1e6 * parts[key]:.1f}", f"{parts[key] / parts['adam']:.2f}"]
        for name, key in named
    ]
    tables = (
        table(header, rows),
        table([*columns, "of one for each"], apart),
        table(["784-20-10 network, one thread", "microseconds", "of Adam's"], spent),
    )
    return "\n\n".join(tables)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("all", "small"), default="all")
    if parser.parse_args().what == "small":
        print(machine(), kernels.status(), sep="\n")
        for _ in range(3):
            print({name: round(ratio, 2) for name, ratio in small().items()})
        return
    print(machine(), kernels.status(), markdown(measure()), sep="\n")
    print("784-20-10 network, microseconds of a step, in graphs of torch.compile and out of them:")
    print({name: round(1e6 * seconds) for name, seconds in in_graphs().items()})


if __name__ == "__main__":
    main()
