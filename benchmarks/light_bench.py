"""LightBench, HeavyBall's suite of pass-or-fail diagnostics, with one untuned attempt each.

    pip install lightbench gpytorch pandas       # 0.1.1 needs all, at the time of writing
    python -m benchmarks.light_bench [TEST ...]       # resumable; runs what the table lacks

A test at a difficulty is passed if its own criterion is met within the steps. The suite searches
four hyperparameters over hundreds of trials and needs CUDA; here every optimizer has one attempt
as its user would start it, AdamW also one at each of seven learning rates, and on a machine
without CUDA the tests run on the CPU. As in the suite, whoever fails a difficulty is not tried at
harder ones. Tests that download are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import inspect
import json
import math
import pkgutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from benchmarks.on_field import NOT_MEASURED
from learned_optim.checkpoint import write_text
from learned_optim.meta.baselines import make_baseline
from learned_optim.meta.runs import learned_optimizer
from learned_optim.pretrained import ALIASES
from learned_optim.summary import table as markdown_table

RESULT = Path(__file__).parent.parent / "docs" / "results" / "lightbench.json"
DIFFICULTIES = ("trivial", "easy", "medium", "hard", "extreme", "nightmare")
# Modules that download, or that are no tests of the suite's own list.
LEFT_OUT = {
    "CIFAR100", "CIFAR10_wide", "MNIST", "SVHN", "Tolstoi_RNN", "grokking", "powers",
    "powers_varying_target", "quadratic_coupled", "relu_boundaries", "spiral",
}  # fmt: skip
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

Make = Callable[[list[Tensor], int], Optimizer]


def attempts() -> dict[str, list[Make]]:
    """Per row of the table, the optimizers of which one has to pass."""

    def adamw(lr: float) -> Make:
        return lambda params, steps: torch.optim.AdamW(params, lr=lr)

    def learned(name: str) -> Make:
        return lambda params, steps: learned_optimizer(params, name, steps)

    shipped = ALIASES["default"]
    return {
        f"`{shipped}`": [learned(shipped)],
        "AdamW at 1e-3": [adamw(1e-3)],
        "Prodigy": [lambda params, steps: make_baseline("prodigy", params, 1.0, steps)],
        "AdamW at the best of seven": [adamw(lr) for lr in LRS],
    }


class OnCPU(TorchFunctionMode):
    """Whatever asks for CUDA gets the CPU."""

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
    """What a test hands to the suite's search instead of being searched."""

    def __init__(self, model: Any, data: Any, loss_fn: Any, win: Any, *args: Any, **_: Any) -> None:
        super().__init__("captured")
        self.model, self.data, self.loss_fn, self.win = model, data, loss_fn, win


def test_names() -> list[str]:
    """Modules of the suite that are tests."""
    import lightbench

    found = []
    for info in pkgutil.iter_modules(lightbench.__path__):
        if info.name not in LEFT_OUT:
            source = (Path(lightbench.__path__[0]) / f"{info.name}.py").read_text()
            if "import" in source and "trial(" in source and "def main(" in source:
                found.append(info.name)
    return [name for name in found if name not in ("utils", "run_all_benchmarks")]


def capture(name: str, difficulty: str, steps: int) -> Captured | None:
    """A test at a difficulty; ``None`` if it has no such one."""
    from lightbench.utils import SkipConfig

    module = importlib.import_module(f"lightbench.{name}")

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
    configs = getattr(module, "configs", None)
    if configs is not None and difficulty not in configs:
        return None
    torch.manual_seed(0)
    try:
        module.main(**arguments)
    except SkipConfig:
        return None
    except Captured as found:
        return found
    raise RuntimeError(f"the test {name} did not start a trial: another version of lightbench?")


def passes(test: Captured, make: Make, steps: int, seconds: float) -> bool:
    """Whether one attempt meets the test's criterion within the steps and the time."""
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
    """Run what the result file lacks, and write it after every test."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"tests": {}, "errors": {}}
    protocol = {
        "version": importlib.metadata.version("lightbench"), "steps": steps, "seconds": seconds
    }  # fmt: skip
    if found.setdefault("protocol", protocol) != protocol:
        raise ValueError(f"{RESULT} was made with {found['protocol']}, not {protocol}: remove it")
    for name in names or test_names():
        known = found["tests"].get(name, {})
        missing = {label: own for label, own in attempts().items() if label not in known}
        if not missing:
            continue
        try:
            found["tests"][name] = {**known, **_outcomes(name, missing, steps, seconds)}
            found["errors"].pop(name, None)
        except ImportError:
            raise
        except Exception as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"
        print(name, found["tests"].get(name) or found["errors"][name], flush=True)
        write_text(RESULT, json.dumps(found, indent=1) + "\n")


def _outcomes(
    name: str, rows: dict[str, list[Make]], steps: int, seconds: float
) -> dict[str, dict[str, bool]]:
    """Per row of the table and difficulty, whether the test was passed."""
    passed: dict[str, dict[str, bool]] = {label: {} for label in rows}
    with nullcontext() if torch.cuda.is_available() else OnCPU():
        for difficulty in DIFFICULTIES:
            test = capture(name, difficulty, steps)
            if test is None:
                continue
            for label, makers in rows.items():
                alive = all(passed[label].values())
                passed[label][difficulty] = alive and any(
                    passes(test, make, steps, seconds) for make in makers
                )
    return passed


def table(path: Path | None = None) -> str:
    """Tests passed, by difficulty, from a result file (docs/results/lightbench.json)."""
    path = path or RESULT
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    labels = list(dict.fromkeys(label for rows in found["tests"].values() for label in rows))
    rows = []
    for label in labels:
        outcomes = [each[label] for each in found["tests"].values()]
        cells = []
        for difficulty in DIFFICULTIES:
            here = [each[difficulty] for each in outcomes if difficulty in each]
            cells.append(f"{sum(here)} of {len(here)}")
        total = [passed for each in outcomes for passed in each.values()]
        rows.append([label, f"{sum(total)} of {len(total)}", *cells])
    protocol, errors = found["protocol"], found["errors"]
    note = f" Tests that could not be run: {', '.join(errors)}." if errors else ""
    return (
        f"lightbench {protocol['version']}, {len(found['tests'])} tests, at most "
        f"{protocol['steps']:,} steps and {protocol['seconds']:g} processor seconds each.{note}\n\n"
        + markdown_table(["optimizer", "passed", *DIFFICULTIES], rows)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TEST", help="modules of lightbench")
    parser.add_argument("--steps", type=int, default=3000, help="of every attempt")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the processor")
    args = parser.parse_args()
    try:
        measure(args.tests, args.steps, args.seconds)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install lightbench gpytorch pandas") from error


if __name__ == "__main__":
    main()
