"""Evaluation: learned optimizers, untuned, against hand-written ones tuned per task.

The protocol. Per seed, every optimizer starts from the same initial parameters and sees the same
batches, and all of them run through their public ``torch.optim`` classes. Each baseline's
learning rate is chosen per task and horizon from :data:`~learned_optim.meta.baselines.LR_GRID` by
the mean summed loss over tuning seeds; the figures come from other seeds. Where it diverges on one
of those, the next best takes its place, in the baseline's favour. The learned optimizer runs at
lr = 1.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from learned_optim.checkpoint import write_text
from learned_optim.meta import protocol
from learned_optim.meta.baselines import LR_GRID, make_baseline
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import seeded
from learned_optim.meta.tasks import Params, TaskOptions, build_tasks
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
        for name in ("checkpoints", "tasks", "baselines", "horizons"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names something twice: {', '.join(map(str, given))}")
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
class Contestant:
    """An optimizer that takes part.

    Attributes:
        label: its name in tables and plots, unique in an evaluation.
        source: checkpoint file, or name of a baseline.
        identity: what its runs are remembered by: a baseline's name, a checkpoint's fingerprint
            (so that a retrained file of the same name is not mistaken for the one evaluated
            before, and a file that was moved is known again).
    """

    label: str
    kind: Literal["learned", "baseline"]
    source: str
    identity: str

    def make(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimizer itself; ``lr`` multiplies a learned update.

        Raises:
            ValueError: the checkpoint file is no longer the one that takes part.
        """
        if self.kind == "baseline":
            return make_baseline(self.source, params, lr)
        rule = load_rule(self.source)
        if rule.fingerprint() != self.identity:
            raise ValueError(
                f"{self.source} was replaced while it was evaluated: it holds "
                f"{rule.fingerprint()}, no longer {self.identity}. Start again; finished runs are "
                f"kept, and those of the new file are done afresh"
            )
        # Measured as it was trained: the warm-up that users get is the optimizer's, not the rule's.
        return LearnedOptimizer(params, rule, lr=lr, warmup=0)


def contestants(checkpoints: Sequence[str], baselines: Sequence[str]) -> list[Contestant]:
    """Everybody who takes part, the learned ones first.

    A checkpoint given as a path is labelled by its file's stem (a folder by its name), unless
    something else of the evaluation would have the same label: then by the path as given.

    Raises:
        ValueError: an unknown checkpoint or baseline; the message lists those that exist.
        FileNotFoundError: a checkpoint file that does not exist.
        ImportError: the package of a baseline is not installed.
    """
    short = {checkpoint: _short_name(checkpoint) for checkpoint in checkpoints}
    uses = Counter([*short.values(), *baselines])
    found = []
    for given, name in short.items():
        label = name if uses[name] == 1 else given
        if label in baselines:
            raise ValueError(f"the checkpoint {given!r} is named like a baseline: give its path")
        path = str(checkpoint_path(given))
        found.append(Contestant(label, "learned", path, load_rule(path).fingerprint()))
    for name in baselines:
        make_baseline(name, [torch.zeros(1)], lr=1.0)  # fails now if it ever does
        found.append(Contestant(name, "baseline", name, name))
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
    optimizer: Contestant
    lr: float
    phase: Literal["tune", "test"]
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
        losses: training loss before each step, ``steps`` numbers; inf from divergence on.
        seconds: forward, backward and optimizer steps; drawing batches is not counted. Infinite
            for a run that diverged.
        test: held-out figures after the last step.
    """

    losses: list[float]
    seconds: float
    test: dict[str, float]


def run(spec: RunSpec, data: DataOptions) -> Run:
    """Train one optimizee with one optimizer, on one thread of torch."""
    family = build_tasks(spec.task, TaskOptions("evaluation", data))
    # Initial parameters and batches follow from task, phase and seed alone: the same for everybody.
    generator = seeded(spec.phase, spec.task, spec.seed)
    task = family.sample(generator)
    params: Params = {n: torch.nn.Parameter(p) for n, p in task.init(generator).items()}
    optimizer = spec.optimizer.make(params.values(), spec.lr)
    losses: list[float] = []
    seconds = 0.0
    with _one_thread(), torch.random.fork_rng(devices=[]):
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
                finite = losses[:-1]
                return Run(finite + [math.inf] * (spec.steps - len(finite)), math.inf, {})
        if hasattr(optimizer, "eval"):  # schedule-free methods evaluate at their averaged weights
            optimizer.eval()
        test = task.test({n: p.detach() for n, p in params.items()})
    return Run(losses, seconds, test)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads split sums differently: the figures must not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RunLog:
    """Finished runs in a JSON-lines file, so that an interrupted evaluation goes on.

    Infinite losses and seconds are ``null`` in the file, since JSON has no infinity.

    Args:
        path: the file; it and its folder appear with the first run added.

    Attributes:
        runs: everything in the file, by :attr:`RunSpec.key`.
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

    def add(self, key: str, finished: Run) -> None:
        """Append a run to the file, and remember it as it will be read again."""
        line = json.dumps(
            {
                "key": key,
                "losses": [_finite(float(f"{x:.6g}")) for x in finished.losses],
                "seconds": _finite(round(finished.seconds, 4)),
                "test": {name: _finite(x) for name, x in finished.test.items()},
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._torn + line + "\n")
        self._torn = False
        self._remember(line)

    def _remember(self, line: str) -> None:
        entry = json.loads(line)
        losses = [math.inf if x is None else x for x in entry["losses"]]
        seconds = math.inf if entry["seconds"] is None else entry["seconds"]
        test = {name: math.nan if x is None else x for name, x in entry["test"].items()}
        self.runs[entry["key"]] = Run(losses, seconds, test)


class Evaluation:
    """Carries out an :class:`EvaluateConfig`; finished runs are kept in ``output/runs.jsonl``.

    Args:
        config: what to evaluate.
        progress: told ``(runs done, runs in all, what)``.

    Raises:
        ValueError: an unknown checkpoint, task or baseline (the message lists those that exist),
            or the runs in ``output`` were made under another torch, text or source of tasks.
        FileNotFoundError: a checkpoint file or a task's data is not there.
    """

    def __init__(
        self, config: EvaluateConfig, progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        self.config = config
        self._progress = progress or (lambda done, total, what: None)
        self.contestants = contestants(config.checkpoints, config.baselines)
        for name in config.tasks:  # an unknown task or missing data fails here, not hours later
            build_tasks(name, TaskOptions("evaluation", config.data))
        self._conditions = protocol.check(
            config.output, protocol.conditions(config.tasks, config.data)
        )
        self._log = RunLog(config.output / "runs.jsonl")

    def execute(self) -> dict[str, Any]:
        """Tune, test, and summarize.

        Returns:
            The summary that :mod:`learned_optim.meta.report` draws; also in ``summary.json``.
        """
        config = self.config
        protocol.remember(config.output, self._conditions)
        tuning = [
            spec
            for task in config.tasks
            for baseline in self.contestants
            if baseline.kind == "baseline"
            for lr in LR_GRID
            for spec in self._tuning_runs(task, baseline, lr)
        ]
        with self._workers() as workers:
            self._perform(tuning, "tuning", workers)
            # Where a tuned learning rate diverges, the next best one is tested too.
            while tests := self._missing_tests():
                self._perform(tests, "testing", workers)
        summary = self.summary()
        write_text(config.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def refresh(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Replace learned optimizers that changed in a summary of the same tasks and seeds.

        Hand-written optimizers keep their figures; only the best of each table run again, with the
        learning rates found before, because ratios are taken seed by seed.

        Raises:
            ValueError: the summary is of another protocol, or what ran again gave other losses.
        """
        config, rules = self.config, self._rules()
        for name, value in rules.items():
            if name != "checkpoints" and summary["protocol"].get(name) != value:
                raise ValueError(
                    f"the summary has {name}={summary['protocol'].get(name)} and this evaluation "
                    f"{value}: evaluate anew"
                )
        learned = [c for c in self.contestants if c.kind == "learned"]
        known = summary["protocol"]["checkpoints"]
        changed = [c for c in learned if known.get(c.label) != c.identity]
        cells, entries = {}, []
        for task in config.tasks:
            for horizon in config.horizons:
                old = summary["tasks"][task]["horizons"][str(horizon)]
                mine = [self._at(task, c, 1.0, horizon) for c in changed]
                best = self._known_best(task, old, horizon, "sum")
                final = self._known_best(task, old, horizon, "final")
                cells[task, horizon] = mine, best, final
                entries += [*mine, best, final]
        with self._workers() as workers:
            self._perform([spec for entry in entries for spec in entry.specs], "testing", workers)
        tasks: dict[str, Any] = {task: {"horizons": {}} for task in config.tasks}
        for (task, horizon), (mine, best, final) in cells.items():
            old = summary["tasks"][task]["horizons"][str(horizon)]
            row = old["optimizers"][best.contestant.label]
            again = self._row(best)["sum"]["mean"]
            # Another processor rounds otherwise, and the runs drift apart, within their spread.
            spread = row["sum"]["half"]
            if not math.isclose(again, row["sum"]["mean"], rel_tol=1e-4, abs_tol=spread):
                raise ValueError(
                    f"{best.contestant.label} on {task} has a summed loss of {again} now, and "
                    f"{row['sum']['mean']} in the summary: evaluate anew"
                )
            kept = {k: r for k, r in old["optimizers"].items() if r["kind"] == "baseline"}
            # What is timed beside each other is compared: not with another machine's time.
            for entry in (best, final):
                time = self._row(entry)["milliseconds_per_step"]
                name = entry.contestant.label
                kept[name] = {**kept[name], "milliseconds_per_step": time}
            new = {
                e.contestant.label: self._row(e) | self._against(e, best) | self._reaching(e, final)
                for e in mine
            }
            every = {c.label: new.get(c.label) or old["optimizers"][c.label] for c in learned}
            tasks[task]["horizons"][str(horizon)] = {**old, "optimizers": {**every, **kept}}
        return {**summary, "protocol": rules, "tasks": tasks}

    def _at(
        self, task: str, contestant: Contestant, lr: float, horizon: int, by: str = "sum"
    ) -> _Entry:
        return _Entry(contestant, lr, lr, horizon, by, self._test_runs(task, contestant, lr))

    def _known_best(self, task: str, cell: dict[str, Any], horizon: int, by: str) -> _Entry:
        """The best hand-written optimizer of a summary's table, as it ran for it."""
        name = cell["best_baseline" if by == "sum" else "best_final_baseline"]
        row = cell["optimizers"][name]
        lr = row["lr"] if by == "sum" else row["tuned_by_final"]["lr"]
        contestant = next(c for c in self.contestants if c.label == name)
        return self._at(task, contestant, lr, horizon, by)

    def _missing_tests(self) -> list[RunSpec]:
        """All test runs that are asked for now, if one of them has still to be done."""
        tests = [s for task in self.config.tasks for e in self._entries(task) for s in e.specs]
        return tests if any(s.key not in self._log.runs for s in tests) else []

    def _tuning_runs(self, task: str, baseline: Contestant, lr: float) -> list[RunSpec]:
        seeds, steps = range(self.config.tuning_seeds), self.config.length
        return [RunSpec(task, baseline, lr, "tune", seed, steps) for seed in seeds]

    @contextmanager
    def _workers(self) -> Iterator[ProcessPoolExecutor | None]:
        """Processes to run in, if there are to be several; they start when first needed."""
        if self.config.workers == 1:
            yield None
            return
        pool = ProcessPoolExecutor(self.config.workers, mp_context=get_context("spawn"))
        try:
            yield pool
        finally:  # after an error or an interrupt, what has not begun never does
            pool.shutdown(cancel_futures=True)

    def _perform(
        self, specs: Sequence[RunSpec], what: str, workers: ProcessPoolExecutor | None
    ) -> None:
        missing = {spec.key: spec for spec in specs if spec.key not in self._log.runs}
        total = len({spec.key for spec in specs})
        done = total - len(missing)
        self._progress(done, total, what)
        for key, finished in self._results(missing, workers):
            self._log.add(key, finished)
            done += 1
            self._progress(done, total, what)

    def _results(
        self, missing: dict[str, RunSpec], workers: ProcessPoolExecutor | None
    ) -> Iterator[tuple[str, Run]]:
        data = self.config.data
        if workers is None:
            for key, spec in missing.items():
                yield key, run(spec, data)
            return
        futures = {workers.submit(run, spec, data): key for key, spec in missing.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()

    # ---- choosing learning rates, and the figures

    def ranked_lrs(
        self, task: str, baseline: Contestant, horizon: int, by: str = "sum"
    ) -> list[float]:
        """Learning rates by their mean over tuning seeds, best first.

        Those that diverged there are left out, unless all of them did.

        Args:
            by: ``"sum"``, the loss summed over ``horizon``; ``"final"``, its mean over the last
                :data:`LAST_STEPS` of them.
        """

        def score(lr: float) -> float:
            runs = [self._log.runs[spec.key] for spec in self._tuning_runs(task, baseline, lr)]
            considered = slice(0 if by == "sum" else horizon - LAST_STEPS, horizon)
            return sum(sum(run.losses[considered]) for run in runs)

        scores = {lr: score(lr) for lr in LR_GRID}
        ranked = sorted(scores, key=scores.__getitem__)
        return [lr for lr in ranked if math.isfinite(scores[lr])] or ranked[:1]

    def _entries(self, task: str) -> list[_Entry]:
        """Who runs how on a task; test runs that several of them need are run once."""
        return [
            self._entry(task, contestant, horizon, by)
            for horizon in self.config.horizons
            for contestant in self.contestants
            for by in (("sum",) if contestant.kind == "learned" else ("sum", "final"))
        ]

    def _entry(self, task: str, contestant: Contestant, horizon: int, by: str) -> _Entry:
        """One optimizer at one horizon, with its best learning rate that does not diverge.

        A run that has not been done yet counts as one that does not.
        """
        learned = contestant.kind == "learned"
        lrs = [1.0] if learned else self.ranked_lrs(task, contestant, horizon, by)
        choices = [
            _Entry(contestant, lr, lrs[0], horizon, by, self._test_runs(task, contestant, lr))
            for lr in lrs
        ]
        return next((e for e in choices if not self._diverges(e)), choices[0])

    def _test_runs(self, task: str, contestant: Contestant, lr: float) -> list[RunSpec]:
        seeds, steps = range(self.config.seeds), self.config.length
        return [RunSpec(task, contestant, lr, "test", seed, steps) for seed in seeds]

    def _diverges(self, entry: _Entry) -> bool:
        """Whether a loss within the horizon is known to be infinite on some test seed."""
        runs = [self._log.runs[s.key] for s in entry.specs if s.key in self._log.runs]
        return any(math.isinf(run.losses[entry.horizon - 1]) for run in runs)

    def summary(self) -> dict[str, Any]:
        """Every figure, by task, horizon and optimizer, with 95 % intervals."""
        tasks = {task: self._task_summary(task) for task in self.config.tasks}
        return {"protocol": self._rules(), "tasks": tasks}

    def _rules(self) -> dict[str, Any]:
        """The protocol, as the summary states it."""
        config = self.config
        return {
            "checkpoints": {c.label: c.identity for c in self.contestants if c.kind == "learned"},
            "baselines": list(config.baselines),
            "horizons": list(config.horizons),
            "seeds": config.seeds,
            "tuning_seeds": config.tuning_seeds,
            "lr_grid": list(LR_GRID),
            "torch": torch.__version__.split("+")[0],
        }

    def _task_summary(self, task: str) -> dict[str, Any]:
        by_horizon: dict[str, Any] = {}
        entries = self._entries(task)
        for horizon in self.config.horizons:
            here = [e for e in entries if e.horizon == horizon]
            best = self._best_baseline(here, "sum")
            best_final = self._best_baseline(here, "final")
            rows = {}
            for entry in here:
                if entry.by == "sum":
                    compared = self._against(entry, best) if best else {}
                    reached = self._reaching(entry, best_final) if best_final else {}
                    rows[entry.contestant.label] = self._row(entry) | compared | reached
                else:
                    rows[entry.contestant.label]["tuned_by_final"] = self._row(entry)
            by_horizon[str(horizon)] = {
                "optimizers": rows,
                "best_baseline": best.contestant.label if best else None,
                "best_final_baseline": best_final.contestant.label if best_final else None,
            }
        return {"horizons": by_horizon}

    def _losses(self, entry: _Entry) -> Tensor:
        """Losses of an entry's runs up to its horizon, float64, ``(seeds, horizon)``."""
        rows = [self._log.runs[spec.key].losses[: entry.horizon] for spec in entry.specs]
        return torch.tensor(rows, dtype=torch.float64)

    def _step_seconds(self, entry: _Entry) -> Tensor:
        """Seconds per step of an entry's runs, float64, ``(seeds,)``."""
        seconds = [self._log.runs[spec.key].seconds for spec in entry.specs]
        return torch.tensor(seconds, dtype=torch.float64) / self.config.length

    def _row(self, entry: _Entry) -> dict[str, Any]:
        """The figures of one optimizer at one horizon."""
        losses = self._losses(entry)
        row: dict[str, Any] = {
            "kind": entry.contestant.kind,
            "lr": entry.lr,
            "tuned_lr": entry.tuned_lr,
            "lr_at_edge": entry.contestant.kind == "baseline" and entry.lr in _EDGES,
            "diverged": int(losses[:, -1].isinf().sum()),
            "sum": interval(losses.sum(1)),
            "last": interval(losses[:, -LAST_STEPS:].mean(1)),
            "milliseconds_per_step": interval(1000 * self._step_seconds(entry)),
            "curve": _curve(losses),
        }
        if entry.horizon == self.config.length:  # held-out figures are taken after the last step
            tests = [self._log.runs[spec.key].test for spec in entry.specs]
            names = sorted({name for test in tests for name in test})
            row["test"] = {
                n: interval(torch.tensor([t.get(n, math.nan) for t in tests])) for n in names
            }
        if entry.horizon > SETTLED_STEP:
            row["worst_after_1000"] = interval(_smooth(losses)[:, SETTLED_STEP:].amax(1))
        return row

    def _best_baseline(self, entries: list[_Entry], by: str) -> _Entry | None:
        """The baseline with the smallest mean loss over test seeds; none if all diverged.

        Args:
            by: ``"sum"``, tuned by and compared in the summed loss; ``"final"``, both in the
                mean over the last :data:`LAST_STEPS`.
        """

        def score(entry: _Entry) -> float:
            losses = self._losses(entry)
            return (losses if by == "sum" else losses[:, -LAST_STEPS:]).sum().item()

        tuned = [e for e in entries if e.contestant.kind == "baseline" and e.by == by]
        return min((e for e in tuned if math.isfinite(score(e))), key=score, default=None)

    def _against(self, entry: _Entry, best: _Entry) -> dict[str, Any]:
        """An entry against the baseline with the best summed loss, seed by seed."""
        mine, theirs = self._losses(entry), self._losses(best)
        return {
            "ratio": ratio_interval(mine.sum(1), theirs.sum(1)),
            "ratio_last": ratio_interval(
                mine[:, -LAST_STEPS:].mean(1), theirs[:, -LAST_STEPS:].mean(1)
            ),
        }

    def _reaching(self, entry: _Entry, best: _Entry) -> dict[str, Any]:
        """When an entry gets to the last loss of the baseline that is best in it, seed by seed."""
        target = self._losses(best)[:, -LAST_STEPS:].mean(1, keepdim=True)
        reached = _smooth(self._losses(entry)) <= target  # (seeds, horizon)
        # Over seeds the median: one that never gets there counts as infinity and spoils nothing.
        steps = torch.where(reached.any(1), reached.int().argmax(1) + 1.0, math.inf)
        return {
            "steps_to_best": _finite(median(steps)),
            "seconds_to_best": _finite(median(steps * self._step_seconds(entry))),
        }


#: A learning rate tuned to one of these might have been better still outside the grid.
_EDGES = (LR_GRID[0], LR_GRID[-1])


@dataclass(frozen=True)
class _Entry:
    """An optimizer on a task at a horizon: its test runs and how its lr was chosen.

    Attributes:
        lr: the learning rate of the runs.
        tuned_lr: the best on tuning seeds; another one where that diverged on a test seed.
    """

    contestant: Contestant
    lr: float
    tuned_lr: float
    horizon: int
    by: str
    specs: list[RunSpec]


def _finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def median(values: Tensor) -> float:
    """The middle of ``values`` (shape ``(n,)``), or the mean of the two middle ones."""
    ordered = values.sort().values
    n = len(ordered)
    return 0.5 * (ordered[(n - 1) // 2] + ordered[n // 2]).item()


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
    stretch = math.ceil(losses.shape[1] / points)
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
