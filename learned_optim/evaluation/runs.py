"""Runs of one optimizer on one task from one seed, and their log.

Per seed, every optimizer starts from the same initial parameters and sees the same batches, and
all of them run through their public ``torch.optim`` classes, on one thread.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.evaluation.baselines import baseline, make_baseline, mark_outer
from learned_optim.evaluation.statistics import finite, pooled
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import seeded, torch_threads
from learned_optim.meta.tasks import Params, TaskFamily, TaskOptions, build_tasks
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.pretrained import checkpoint_path, load_rule
from learned_optim.rules import rule_class, rule_names

#: Most stretches of a run's steps over which losses are averaged.
STRETCHES = 100

Progress = Callable[[int, int, str], None]
Phase = Literal["tune", "test"]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that is evaluated.

    Attributes:
        label: its name in tables and plots, unique in an evaluation.
        source: checkpoint file, or name of a baseline.
        identity: what its runs are remembered by: a baseline's name, or a checkpoint's fingerprint,
            which a retrained file of the same name does not share.
        told: whether a learned optimizer is told the number of steps.
    """

    label: str
    kind: Literal["learned", "baseline"]
    source: str
    identity: str
    told: bool = True

    @property
    def lr(self) -> float | None:
        """Its own learning rate; ``None`` if that is tuned per task."""
        return 1.0 if self.kind == "learned" else baseline(self.source).lr

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen per task."""
        return self.lr is None

    def make(self, params: Iterable[Tensor], lr: float, total_steps: int) -> Optimizer:
        """The optimizer itself; ``lr`` multiplies a learned update."""
        if self.kind == "baseline":
            return make_baseline(self.source, params, lr, total_steps)
        rule = load_rule(self.source)
        if not self.identity.startswith(rule.fingerprint()):
            raise ValueError(
                f"{self.source} was replaced while it was evaluated: it holds "
                f"{rule.fingerprint()}, no longer {self.identity}. Start again; finished runs are "
                f"kept, and those of the new file are done afresh"
            )
        told = total_steps if self.told and rule.reads_horizon else None
        return LearnedOptimizer(params, rule, lr=lr, total_steps=told)


def optimizer_specs(
    checkpoints: Sequence[str], baselines: Sequence[str], told: bool = True
) -> list[OptimizerSpec]:
    """The optimizers of an evaluation, the learned ones first.

    A checkpoint given as a path is labelled by its file's stem (a folder by its name), unless
    something else of the evaluation would have the same label: then by the path as given. Errors
    are those of :func:`load_rule` and :func:`make_baseline`.
    """
    short = {checkpoint: _short_name(checkpoint) for checkpoint in checkpoints}
    uses = Counter([*short.values(), *baselines])
    found = []
    for given, name in short.items():
        label = name if uses[name] == 1 else given
        if label in baselines:
            raise ValueError(f"the checkpoint {given!r} is named like a baseline: give its path")
        path = str(checkpoint_path(given))
        identity = load_rule(path).fingerprint() + (" without total_steps" * (not told))
        found.append(OptimizerSpec(label, "learned", path, identity, told))
    for name in baselines:
        make_baseline(name, [torch.zeros(1)], 1.0, total_steps=1)  # fails now if it ever does
        settings = baseline(name).settings
        identity = f"{name} ({settings})" if settings else name
        found.append(OptimizerSpec(name, "baseline", name, identity))
    return found


def _short_name(checkpoint: str) -> str:
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else checkpoint


@dataclass(frozen=True)
class RunSpec:
    """One optimizer on one task from one seed.

    Attributes:
        lr: the baseline's learning rate, or the learned update's multiplier.
        phase: tuning and test seeds draw different initial parameters and batches.
    """

    task: str
    optimizer: OptimizerSpec
    lr: float
    phase: Phase
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Identity of the run in the log."""
        who = self.optimizer
        parts = (self.task, who.kind, who.identity, self.lr, self.phase, self.seed, self.steps)
        return "|".join(map(str, parts))


@dataclass(frozen=True)
class Run:
    """The outcome of a :class:`RunSpec`.

    Attributes:
        losses: training losses before each step, as means over at most :data:`STRETCHES` equal
            stretches; inf from divergence on.
        seconds: processor seconds of forward, backward and optimizer steps; drawing batches is
            not counted. Infinite for a run that diverged.
        test: held-out figures after the last step.
        optimizer_seconds: the part of ``seconds`` spent in the optimizer's steps.
    """

    losses: list[float]
    seconds: float
    test: dict[str, float]
    optimizer_seconds: float = math.inf


def run(spec: RunSpec, data: DataOptions, families: Mapping[str, TaskFamily] | None = None) -> Run:
    """Train one optimizee with one optimizer, on one thread of torch.

    ``families`` are tasks without a registered name, by the name that ``spec`` has for them.
    """
    given = (families or {}).get(spec.task)
    family = given or build_tasks(spec.task, TaskOptions("evaluation", data))
    # Initial parameters and batches follow from task, phase and seed alone: the same for everybody.
    generator = seeded(spec.phase, spec.task, spec.seed)
    task = family.sample(generator)
    params: Params = {n: torch.nn.Parameter(p) for n, p in task.init(generator).items()}
    mark_outer(params, getattr(task, "module", None))
    optimizer = spec.optimizer.make(params.values(), spec.lr, spec.steps)
    losses: list[float] = []
    seconds = optimizer_seconds = 0.0
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # for tasks whose forward pass is random (dropout)
        for step in range(spec.steps):
            batch = task.batch(generator)
            started = time.process_time()
            optimizer.zero_grad()
            loss = task.loss(params, batch)
            loss.backward()
            stepping = time.process_time()
            optimizer.step()
            optimizer_seconds += time.process_time() - stepping
            losses.append(loss.item())
            seconds += time.process_time() - started
            if not math.isfinite(losses[-1]):
                losses[-1:] = [math.inf] * (spec.steps - step)
                return Run(pooled(losses, STRETCHES), math.inf, {})
        if hasattr(optimizer, "eval"):  # schedule-free methods evaluate at their averaged weights
            optimizer.eval()
        test = task.test({n: p.detach() for n, p in params.items()})
    return Run(pooled(losses, STRETCHES), seconds, test, optimizer_seconds)


class RunLog:
    """Finished runs in a JSON-lines file, so that an interrupted evaluation goes on.

    Infinite losses and seconds are ``null`` in the file, since JSON has no infinity. The file and
    its folder appear with the first run added. ``runs`` has its content by :attr:`RunSpec.key`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            # A kill may have cut a line short: that run is done again.
            with suppress(json.JSONDecodeError):
                self._remember(line)
        self._torn = bool(text) and not text.endswith("\n")

    def lacks(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Those of ``specs`` that have no finished run."""
        return [spec for spec in specs if spec.key not in self.runs]

    def add(self, key: str, finished: Run) -> None:
        """Append a run to the file, and keep it as it will be read again."""
        line = json.dumps(
            {
                "key": key,
                "losses": [finite(float(f"{x:.6g}")) for x in finished.losses],
                "seconds": finite(round(finished.seconds, 4)),
                "test": {name: finite(x) for name, x in finished.test.items()},
                "optimizer_seconds": finite(round(finished.optimizer_seconds, 4)),
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._torn + line + "\n")
        self._torn = False
        self._remember(line)

    def _remember(self, line: str) -> None:
        entry = json.loads(line)
        self.runs[entry["key"]] = Run(
            [_number(x) for x in entry["losses"]],
            _number(entry["seconds"]),
            {name: math.nan if x is None else x for name, x in entry["test"].items()},
            _number(entry["optimizer_seconds"]),
        )


def _number(x: float | None) -> float:
    """A number of a JSON file in which infinity is ``null``."""
    return math.inf if x is None else x


def _import_modules(modules: set[str]) -> None:
    """Import, in a worker, the modules that define update rules."""
    for module in modules - {"__main__"}:
        with suppress(ImportError):  # a rule that no run needs may live in a notebook or a test
            importlib.import_module(module)


def _outcomes(
    perform: Callable[[RunSpec], Run], specs: Iterable[RunSpec], workers: int
) -> Iterator[tuple[RunSpec, Run]]:
    """Runs with their outcomes as they end, in this process or in several."""
    if workers == 1:
        yield from ((spec, perform(spec)) for spec in specs)
        return
    modules = {rule_class(name).__module__ for name in rule_names()}
    # Processes start when first needed.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _import_modules, (modules,))
    try:
        futures = {pool.submit(perform, spec): spec for spec in specs}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:  # after an error or an interrupt, what has not begun never does
        pool.shutdown(cancel_futures=True)


def run_missing(
    log: RunLog,
    specs: Sequence[RunSpec],
    perform: Callable[[RunSpec], Run],
    progress: Progress,
    workers: int = 1,
) -> None:
    """Do the runs that the log lacks; progress counts all of them."""
    missing = {spec.key: spec for spec in log.lacks(specs)}
    total = len({spec.key for spec in specs})
    progress(total - len(missing), total, "runs")
    outcomes = _outcomes(perform, missing.values(), workers)
    for done, (spec, finished) in enumerate(outcomes, start=total - len(missing) + 1):
        log.add(spec.key, finished)
        progress(done, total, "runs")
