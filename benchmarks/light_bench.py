"""LightBench, HeavyBall's suite of pass-or-fail tests, with one untuned attempt each.

    pip install lightbench gpytorch pandas       # 0.1.1 imports all three
    python -m benchmarks light-bench [TEST ...]  # runs what docs/results/lightbench.json lacks

A test at a difficulty is passed if its own criterion is met within the steps and the processor
seconds. The suite searches four hyperparameters over hundreds of trials and needs CUDA. Here every
optimizer has one attempt, as a user starts it, and one row holds AdamW at the best of seven
learning rates. Without CUDA the tests run on the CPU. As in the suite, an optimizer that fails a
difficulty is not tried at harder ones. Tests that download are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import inspect
import math
import pkgutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from benchmarks.common import RESULTS, load, save, shipped
from learned_optim import LearnedOptimizer
from learned_optim.summary import table

OUTPUT = RESULTS / "lightbench.json"
DIFFICULTIES = ("trivial", "easy", "medium", "hard", "extreme", "nightmare")
#: Modules that download, or that are no tests of the suite's own list.
LEFT_OUT = {
    "CIFAR100", "CIFAR10_wide", "MNIST", "SVHN", "Tolstoi_RNN", "grokking", "powers",
    "powers_varying_target", "quadratic_coupled", "relu_boundaries", "run_all_benchmarks", "spiral",
    "utils",
}  # fmt: skip
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

Make = Callable[[list[Tensor], int], Optimizer]


def attempts() -> dict[str, list[Make]]:
    """Returns the optimizers of every row, of which one has to pass."""

    def adamw(lr: float) -> Make:
        return lambda params, steps: AdamW(params, lr=lr)

    def prodigy(params: list[Tensor], steps: int) -> Optimizer:
        from prodigyopt import Prodigy

        return Prodigy(params, lr=1.0)

    default = shipped()[0]
    return {
        default: [lambda params, steps: LearnedOptimizer(params, default, total_steps=steps)],
        "AdamW at 1e-3": [adamw(1e-3)],
        "Prodigy": [prodigy],
        "AdamW at the best of seven": [adamw(lr) for lr in LRS],
    }


class OnCPU(TorchFunctionMode):
    """Gives a CPU tensor to whatever asks for CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return func(*args, **kwargs)


class Captured(Exception):
    """A test, raised in place of the suite's search."""

    def __init__(self, model: Any, data: Any, loss_fn: Any, win: Any, *args: Any, **_: Any) -> None:
        super().__init__("captured")
        self.model, self.data, self.loss_fn, self.win = model, data, loss_fn, win


def test_names() -> list[str]:
    """Returns the modules of the suite that are tests."""
    import lightbench

    folder = Path(lightbench.__path__[0])
    names = {info.name for info in pkgutil.iter_modules([str(folder)])} - LEFT_OUT
    sources = {name: (folder / f"{name}.py").read_text() for name in sorted(names)}
    return [n for n, text in sources.items() if "trial(" in text and "def main(" in text]


def capture(name: str, difficulty: str, steps: int) -> Captured | None:
    """Returns a test at a difficulty, or ``None`` if the test does not have it."""
    from lightbench.utils import SkipConfig

    module = importlib.import_module(f"lightbench.{name}")
    if difficulty not in getattr(module, "configs", (difficulty,)):
        return None

    def caught(*args: Any, **kwargs: Any) -> None:
        raise Captured(*args, **kwargs)

    module.trial = caught
    given = {"steps": steps, "weight_decay": 0.0, "trials": 1, "config": difficulty}
    arguments = {}
    for key, parameter in inspect.signature(module.main).parameters.items():
        usual = getattr(parameter.default, "default", parameter.default)
        if key in ("dtype", "opt"):
            text = "float32" if key == "dtype" else "AdamW"
            arguments[key] = [text] if isinstance(usual, list) else text
        else:
            arguments[key] = given.get(key, usual)
    torch.manual_seed(0)
    try:
        module.main(**arguments)
    except SkipConfig:
        return None
    except Captured as found:
        return found
    raise RuntimeError(f"the test {name} did not start a trial: another version of lightbench?")


def passes(test: Captured, make: Make, steps: int, seconds: float) -> bool:
    """Returns whether one attempt meets the test's criterion in time."""
    torch.manual_seed(0)
    model = copy.deepcopy(test.model).float()
    optimizer = make(list(model.parameters()), steps)
    started = time.process_time()  # other work on the machine does not count
    for _ in range(steps):
        inputs, targets = test.data() if test.data is not None else (None, None)
        optimizer.zero_grad()
        loss = model() if inputs is None else model(inputs)
        if test.loss_fn is not None:
            loss = test.loss_fn(loss, targets)
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value) or time.process_time() - started > seconds:
            return False
        if test.win(model, value)[0]:
            return True
    return False


def measure(names: Sequence[str], steps: int, seconds: float) -> None:
    """Runs what the file of results lacks, and writes the file after every test."""
    found = load(OUTPUT) if OUTPUT.exists() else {"tests": {}, "errors": {}}
    protocol = {
        "version": importlib.metadata.version("lightbench"), "steps": steps, "seconds": seconds
    }  # fmt: skip
    if found.setdefault("protocol", protocol) != protocol:
        raise ValueError(f"{OUTPUT} was made with {found['protocol']}, not {protocol}: remove it")
    for name in names or test_names():
        known = found["tests"].get(name, {})
        missing = {row: makers for row, makers in attempts().items() if row not in known}
        if not missing:
            continue
        try:
            found["tests"][name] = {**known, **outcomes(name, missing, steps, seconds)}
            found["errors"].pop(name, None)
        except ImportError:
            raise
        except Exception as error:  # one test's fault is not the end of the others
            found["errors"][name] = f"{type(error).__name__}: {error}"
        print(name, found["tests"].get(name) or found["errors"][name], flush=True)
        save(OUTPUT, found)


def outcomes(
    name: str, rows: dict[str, list[Make]], steps: int, seconds: float
) -> dict[str, dict[str, bool]]:
    """Returns whether each row passes, by difficulty."""
    passed: dict[str, dict[str, bool]] = {row: {} for row in rows}
    with nullcontext() if torch.cuda.is_available() else OnCPU():
        for difficulty in DIFFICULTIES:
            test = capture(name, difficulty, steps)
            if test is None:
                continue
            for row, makers in rows.items():
                alive = all(passed[row].values())
                passed[row][difficulty] = alive and any(
                    passes(test, make, steps, seconds) for make in makers
                )
    return passed


def results_table(found: dict[str, Any]) -> str:
    """Returns the numbers of tests passed by difficulty, Markdown."""
    labels = list(dict.fromkeys(row for rows in found["tests"].values() for row in rows))
    rows = []
    for label in labels:
        outcome = [each[label] for each in found["tests"].values()]
        total = [passed for each in outcome for passed in each.values()]
        cells = [str(sum(each.get(d, False) for each in outcome)) for d in DIFFICULTIES]
        rows.append([label, f"{sum(total)} of {len(total)}", *cells])
    return table(["optimizer", "passed", *DIFFICULTIES], rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tests", nargs="*", metavar="TEST", help="modules of lightbench")
    parser.add_argument("--steps", type=int, default=3000, help="of every attempt")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the processor")


def run(options: argparse.Namespace) -> None:
    try:
        measure(options.tests, options.steps, options.seconds)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install lightbench gpytorch pandas") from error
