"""Evaluation: learned optimizers, untuned, against hand-written ones tuned per task.

The protocol. Per seed, every optimizer starts from the same initial parameters and sees the same
batches, and all of them run through their public ``torch.optim`` classes. Each baseline's
learning rate is chosen per task and horizon from :data:`~learned_optim.meta.baselines.LR_GRID` by
the mean summed loss over tuning seeds; the figures come from other seeds. The learned optimizer
runs at lr = 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from learned_optim.checkpoint import write_atomically
from learned_optim.meta.baselines import LR_GRID, make_baseline
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import TaskOptions, build_tasks
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.pretrained import checkpoint_path, load_rule

#: Loss figures of a run are means over this many last steps.
LAST_STEPS = 10
#: Long runs also report the worst smoothed loss after this step.
SETTLED_STEP = 1000


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what, and how thoroughly."""

    checkpoints: tuple[str, ...] = ("default",)
    """Shipped names, files or Hub ids of learned optimizers; they run at lr = 1."""
    tasks: tuple[str, ...] = ("digits",)
    """Registered task names."""
    baselines: tuple[str, ...] = ("sgd", "nesterov", "rmsprop", "adam")
    """Hand-written optimizers, tuned per task."""
    horizons: tuple[int, ...] = (100, 200)
    """Numbers of steps to report; runs are as long as the largest."""
    seeds: int = 10
    """Test seeds."""
    tuning_seeds: int = 3
    """Seeds on which the baselines' learning rates are chosen; never those of the test."""
    output: Path = Path("evaluation")
    """Folder for the runs, the table and the plots."""
    workers: int = 1
    """Processes; each computes on one thread."""
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if not self.tasks or not self.horizons or not (self.checkpoints or self.baselines):
            raise ValueError("evaluate needs at least one task, one horizon and one optimizer")
        if min(self.horizons) < LAST_STEPS:
            raise ValueError(f"horizons must be at least {LAST_STEPS}, got {self.horizons}")
        if self.seeds < 2 or self.tuning_seeds < 1:
            raise ValueError(
                f"seeds must be at least 2 (intervals) and tuning_seeds at least 1, "
                f"got {self.seeds} and {self.tuning_seeds}"
            )

    @property
    def length(self) -> int:
        """Steps of every run."""
        return max(self.horizons)


@dataclass(frozen=True)
class RunSpec:
    """One optimizer on one task from one seed.

    Attributes:
        optimizer: baseline name, or checkpoint.
        lr: the baseline's learning rate, or the learned update's multiplier.
        phase: tuning and test seeds draw different initial parameters and batches.
    """

    task: str
    kind: Literal["learned", "baseline"]
    optimizer: str
    lr: float
    phase: Literal["tune", "test"]
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Identity of the run in the log."""
        return "|".join(str(v) for v in dataclasses.astuple(self))


@dataclass(frozen=True)
class Run:
    """The outcome of a :class:`RunSpec`.

    Attributes:
        losses: training loss before each step, ``steps`` numbers; inf from divergence on.
        seconds: forward, backward and optimizer steps; drawing batches is not counted.
        test: held-out figures after the last step.
    """

    losses: list[float]
    seconds: float
    test: dict[str, float]


def run(spec: RunSpec, data: DataOptions) -> Run:
    """Train one optimizee with one optimizer."""
    family = build_tasks(spec.task, TaskOptions("evaluation", data))
    generator = seeded(spec.phase, spec.task, spec.seed)
    task = family.sample(generator)
    params = {n: torch.nn.Parameter(p) for n, p in task.init(generator).items()}
    if spec.kind == "learned":
        optimizer: torch.optim.Optimizer = LearnedOptimizer(
            params.values(), load_rule(spec.optimizer), lr=spec.lr
        )
    else:
        optimizer = make_baseline(spec.optimizer, params.values(), spec.lr)
    losses: list[float] = []
    seconds = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # for tasks whose forward pass is random (dropout)
        for _ in range(spec.steps):
            batch = task.batch(generator)
            started = time.perf_counter()
            optimizer.zero_grad()
            loss = task.loss(params, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds += time.perf_counter() - started
            if not math.isfinite(losses[-1]):
                losses += [math.inf] * (spec.steps - len(losses))
                losses = [x if math.isfinite(x) else math.inf for x in losses]
                return Run(losses, math.inf, {})
    if hasattr(optimizer, "eval"):  # schedule-free methods evaluate at their averaged weights
        optimizer.eval()
    return Run(losses, seconds, task.test({n: p.detach() for n, p in params.items()}))


def _in_worker(spec: RunSpec, data: DataOptions) -> Run:
    torch.set_num_threads(1)
    return run(spec, data)


class RunLog:
    """Finished runs in a JSON-lines file, so that an interrupted evaluation goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line a kill cut short
                    continue
                losses = [math.inf if x is None else x for x in entry["losses"]]
                seconds = math.inf if entry["seconds"] is None else entry["seconds"]
                self.runs[entry["key"]] = Run(losses, seconds, entry["test"])

    def add(self, key: str, finished: Run) -> None:
        """Remember a run and append it to the file."""
        self.runs[key] = finished
        entry = {
            "key": key,
            "losses": [float(f"{x:.6g}") if math.isfinite(x) else None for x in finished.losses],
            "seconds": round(finished.seconds, 4) if math.isfinite(finished.seconds) else None,
            "test": finished.test,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Evaluation:
    """Carries out an :class:`EvaluateConfig`; finished runs are kept in ``output/runs.jsonl``.

    Args:
        config: what to evaluate.
        progress: told ``(runs done, runs in all, what)``.
    """

    def __init__(
        self, config: EvaluateConfig, progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        self.config = config
        self._progress = progress or (lambda done, total, what: None)
        self._log = RunLog(config.output / "runs.jsonl")
        # A checkpoint's fingerprint stands in its keys: a retrained file of the same name must
        # not be mistaken for the one already evaluated.
        self._sources = {c: str(checkpoint_path(c)) for c in config.checkpoints}
        self._keys = {c: f"{c}#{load_rule(c).fingerprint()}" for c in config.checkpoints}

    def execute(self) -> dict[str, Any]:
        """Tune, test, and summarize.

        Returns:
            The summary that :mod:`learned_optim.meta.report` draws; also in ``summary.json``.
        """
        config = self.config
        for name in config.tasks:  # an unknown task or missing data fails here, not hours later
            build_tasks(name, TaskOptions("evaluation", config.data))
        tuning = [
            self._spec(task, "baseline", baseline, lr, "tune", seed)
            for task in config.tasks
            for baseline in config.baselines
            for lr in LR_GRID
            for seed in range(config.tuning_seeds)
        ]
        self._perform(tuning, "tuning")
        tests = [
            spec for task in config.tasks for entry in self._entries(task) for spec in entry.specs
        ]
        self._perform(tests, "testing")
        summary = self.summary()
        text = json.dumps(summary, indent=1)
        write_atomically(config.output / "summary.json", lambda path: path.write_text(text) and None)
        return summary

    def _spec(
        self,
        task: str,
        kind: Literal["learned", "baseline"],
        optimizer: str,
        lr: float,
        phase: Literal["tune", "test"],
        seed: int,
    ) -> RunSpec:
        return RunSpec(task, kind, optimizer, lr, phase, seed, self.config.length)

    def _key(self, spec: RunSpec) -> str:
        return dataclasses.replace(
            spec, optimizer=self._keys.get(spec.optimizer, spec.optimizer)
        ).key

    def _result(self, spec: RunSpec) -> Run:
        return self._log.runs[self._key(spec)]

    def _perform(self, specs: Sequence[RunSpec], what: str) -> None:
        unique = {self._key(spec): spec for spec in specs}
        missing = {key: spec for key, spec in unique.items() if key not in self._log.runs}
        done = len(unique) - len(missing)
        self._progress(done, len(unique), what)
        for key, finished in self._results(missing):
            self._log.add(key, finished)
            done += 1
            self._progress(done, len(unique), what)

    def _results(self, missing: dict[str, RunSpec]) -> Iterator[tuple[str, Run]]:
        resolved = {
            key: dataclasses.replace(
                spec, optimizer=self._sources.get(spec.optimizer, spec.optimizer)
            )
            for key, spec in missing.items()
        }
        if self.config.workers == 1 or len(missing) < 2:
            for key, spec in resolved.items():
                yield key, run(spec, self.config.data)
            return
        with ProcessPoolExecutor(self.config.workers, mp_context=get_context("spawn")) as pool:
            futures = {
                pool.submit(_in_worker, spec, self.config.data): key
                for key, spec in resolved.items()
            }
            for future in as_completed(futures):
                yield futures[future], future.result()

    # ---- choosing learning rates, and the figures

    def tuned_lr(self, task: str, baseline: str, horizon: int, by: str = "sum") -> float:
        """The learning rate with the smallest mean over tuning seeds.

        Args:
            by: ``"sum"``, the loss summed over ``horizon``; ``"final"``, its mean over the last
                :data:`LAST_STEPS` of them.
        """

        def score(lr: float) -> float:
            values = []
            for seed in range(self.config.tuning_seeds):
                spec = self._spec(task, "baseline", baseline, lr, "tune", seed)
                losses = self._result(spec).losses[:horizon]
                values.append(sum(losses if by == "sum" else losses[-LAST_STEPS:]))
            return sum(values) / len(values)

        return min(LR_GRID, key=score)

    def _entries(self, task: str) -> list[_Entry]:
        config = self.config
        entries = []
        for horizon in config.horizons:
            for name in config.checkpoints:
                entries.append(self._entry(task, "learned", name, 1.0, horizon, "sum"))
            for name in config.baselines:
                for by in ("sum", "final"):
                    lr = self.tuned_lr(task, name, horizon, by)
                    entries.append(self._entry(task, "baseline", name, lr, horizon, by))
        return entries

    def _entry(
        self,
        task: str,
        kind: Literal["learned", "baseline"],
        name: str,
        lr: float,
        horizon: int,
        by: str,
    ) -> _Entry:
        seeds = range(self.config.seeds)
        specs = [self._spec(task, kind, name, lr, "test", seed) for seed in seeds]
        return _Entry(kind, name, lr, horizon, by, specs)

    def summary(self) -> dict[str, Any]:
        """Every figure, by task, horizon and optimizer, with 95 % intervals."""
        config = self.config
        protocol = {
            "checkpoints": self._keys,
            "baselines": list(config.baselines),
            "horizons": list(config.horizons),
            "seeds": config.seeds,
            "tuning_seeds": config.tuning_seeds,
            "lr_grid": list(LR_GRID),
            "torch": torch.__version__.split("+")[0],
        }
        return {"protocol": protocol, "tasks": {t: self._task_summary(t) for t in config.tasks}}

    def _task_summary(self, task: str) -> dict[str, Any]:
        by_horizon: dict[str, Any] = {}
        entries = self._entries(task)
        for horizon in self.config.horizons:
            here = [e for e in entries if e.horizon == horizon]
            rows = {}
            for entry in here:
                if entry.by == "sum":
                    rows[entry.name] = self._row(entry, self._losses(entry))
            for entry in here:
                if entry.by == "final":
                    rows[entry.name]["tuned_by_final"] = self._row(entry, self._losses(entry))
            best = self._best_baseline(here)
            if best is not None:
                for entry in here:
                    if entry.kind == "learned":
                        rows[entry.name] |= self._against(entry, best)
            by_horizon[str(horizon)] = {
                "optimizers": rows,
                "best_baseline": best.name if best else None,
            }
        return {"horizons": by_horizon}

    def _losses(self, entry: _Entry) -> Tensor:
        """Losses of an entry's runs up to its horizon, float64, ``(seeds, horizon)``."""
        rows = [self._result(spec).losses[: entry.horizon] for spec in entry.specs]
        return torch.tensor(rows, dtype=torch.float64)

    def _row(self, entry: _Entry, losses: Tensor) -> dict[str, Any]:
        runs = [self._result(spec) for spec in entry.specs]
        whole = entry.horizon == self.config.length
        row: dict[str, Any] = {
            "kind": entry.kind,
            "lr": entry.lr,
            "sum": interval(losses.sum(1)),
            "last": interval(losses[:, -LAST_STEPS:].mean(1)),
            "curve": _curve(losses),
        }
        if whole:
            seconds = torch.tensor([r.seconds for r in runs], dtype=torch.float64)
            row["milliseconds_per_step"] = interval(1000 * seconds / entry.horizon)
            names = sorted({name for r in runs for name in r.test})
            row["test"] = {
                n: interval(torch.tensor([r.test.get(n, math.nan) for r in runs])) for n in names
            }
        if entry.horizon > SETTLED_STEP:
            row["worst_after_1000"] = interval(_smooth(losses)[:, SETTLED_STEP:].amax(1))
        return row

    def _best_baseline(self, entries: list[_Entry]) -> _Entry | None:
        tuned = [e for e in entries if e.kind == "baseline" and e.by == "sum"]
        return min(tuned, key=lambda e: self._losses(e).sum().item(), default=None)

    def _against(self, entry: _Entry, best: _Entry) -> dict[str, Any]:
        mine, theirs = self._losses(entry), self._losses(best)
        target = theirs[:, -LAST_STEPS:].mean(1, keepdim=True)
        reached = _smooth(mine) <= target  # (seeds, horizon)
        steps = torch.where(reached.any(1), reached.int().argmax(1) + 1, math.inf)
        return {
            "ratio": ratio_interval(mine.sum(1), theirs.sum(1)),
            "ratio_last": ratio_interval(
                mine[:, -LAST_STEPS:].mean(1), theirs[:, -LAST_STEPS:].mean(1)
            ),
            # The median: a seed that never gets there counts as infinity without spoiling it.
            "steps_to_best": _finite(steps.median().item()),
        }


@dataclass(frozen=True)
class _Entry:
    """An optimizer on a task at a horizon: its test runs and how its lr was chosen."""

    kind: Literal["learned", "baseline"]
    name: str
    lr: float
    horizon: int
    by: str
    specs: list[RunSpec]


def _finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def interval(values: Tensor) -> dict[str, float | None]:
    """Mean of ``values`` (shape ``(n,)``) and half the width of its 95 % Student interval."""
    from scipy import stats

    values = values.double()
    mean = values.mean().item()
    half = stats.t.ppf(0.975, len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return {"mean": _finite(mean), "half": _finite(float(half))}


def ratio_interval(mine: Tensor, theirs: Tensor, resamples: int = 10_000) -> dict[str, Any]:
    """Ratio of the means of paired values with its 95 % bootstrap interval over the pairs."""
    n = len(mine)
    index = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    ratios = mine[index].mean(1) / theirs[index].mean(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    mean = (mine.mean() / theirs.mean()).item()
    return {"mean": _finite(mean), "low": _finite(low), "high": _finite(high)}


def _smooth(losses: Tensor, width: int = LAST_STEPS) -> Tensor:
    """Running mean over the last ``width`` steps (fewer at the start), same shape."""
    head = losses[:, : width - 1].cumsum(1) / torch.arange(1, width)
    return torch.cat((head, losses.unfold(1, width, 1).mean(2)), dim=1)


def _curve(losses: Tensor, points: int = 200) -> dict[str, list[float | None]]:
    """Mean and 95 % interval over the seeds at up to ``points`` steps, for plotting.

    Longer runs are averaged over equal stretches of steps first.
    """
    stretch = max(1, losses.shape[1] // points)
    length = losses.shape[1] // stretch * stretch
    pooled = losses[:, :length].unflatten(1, (-1, stretch)).mean(2)  # (seeds, points)
    cells = [interval(column) for column in pooled.t()]
    return {
        "step": [float(i * stretch + (stretch - 1) / 2) for i in range(pooled.shape[1])],
        "mean": [_short(c["mean"]) for c in cells],
        "half": [_short(c["half"]) for c in cells],
    }


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.5g}")
