"""Meta-training: epochs of optimizee runs, validation, and a run folder that survives a kill."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learned_optim.checkpoint import CheckpointError, read_checkpoint, save_rule
from learned_optim.meta import provenance
from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions
from learned_optim.meta.estimators import ESTIMATORS, EstimatorOptions
from learned_optim.meta.meta_loss import SMALLEST_LOSS, imitation, loss_weights
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.rollout import Optimizees
from learned_optim.meta.run_folder import RunFolder, source_modules
from learned_optim.meta.schedules import Plan
from learned_optim.meta.seeding import global_generator_seeded, seeded
from learned_optim.meta.tasks import TaskFamily, TaskOptions, build_tasks
from learned_optim.meta.tasks._rescaled import Rescaled
from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for

#: Told ``(what, done, total)`` while runs are validated or tested.
Report = Callable[[str, int, int], None]

#: What has helped where training diverged.
ADVICE = "Lower --meta-lr (learned-optim search tries several), or clip with --clip-norm"


@dataclass(frozen=True)
class TrainConfig:
    """Meta-train an update rule; an interrupted run goes on when started again."""

    recipe: Recipe
    folder: Path = Path("runs")
    """Run folder: metrics, best checkpoint, resume state."""
    output: Path | None = None
    """Where the finished checkpoint goes; into the run folder if not given."""
    threads: int = 1
    """Threads of torch: more change the last bits, and hardly the time, of small optimizees."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where image sets are looked for."""


class TrainingError(ValueError):
    """A meta-training that has come to nothing; the message says why and what may help."""


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: 1-based.
        meta_loss: mean over the epoch's runs of the mean loss times the horizon.
        validation: mean summed loss over the validation runs with the weights that would be kept.
        best: smallest validation so far.
        dropped: unrolls of this epoch left out because something in them was not finite.
        meta_lr: meta-learning rate after the epoch.
        seconds: duration of the epoch with its validation.
    """

    epoch: int
    meta_loss: float
    validation: float
    best: float
    dropped: int
    meta_lr: float
    seconds: float


def summed_losses(
    rule: UpdateRule,
    family: TaskFamily,
    horizon: int,
    seeds: list[tuple[object, ...]],
    together: int = 8,
    on_runs: Callable[[int], None] | None = None,
) -> Tensor:
    """Loss summed over ``horizon`` steps of frozen-rule runs, one per seed; shape ``(seeds,)``.

    Args:
        seeds: what :func:`seeded` makes each run's generator from.
        together: runs side by side.
        on_runs: told how many are done.
    """
    sums = []
    for low in range(0, len(seeds), together):
        generators = [seeded(*parts) for parts in seeds[low : low + together]]
        tasks = [family.sample(generator) for generator in generators]
        optimizees = Optimizees(rule, tasks, generators, stacked=family.stackable)
        with global_generator_seeded(*seeds[low], "forward"):
            sums.append(torch.stack([optimizees.advance(rule) for _ in range(horizon)]).sum(0))
        if on_runs is not None:
            on_runs(min(low + together, len(seeds)))
    return torch.cat(sums)


class MetaTrainer:
    """Runs a recipe in a folder; a second trainer on the same folder goes on where it stopped.

    The folder holds ``recipe.json``, ``protocol.json`` (versions, and the source of a task or rule
    of one's own), ``metrics.jsonl`` (one line per epoch), ``best.safetensors`` (best by validation)
    and ``resume.pt``. A kill loses at most the current epoch, and a resumed run gives the same bits
    as an uninterrupted one.

    Under ``torchrun``, ranks share the tasks of every meta-step and average their meta-gradients;
    or, with the estimators ``es`` and ``pes``, the pairs of perturbations, and exchange fitness.

    Args:
        recipe: what to train.
        folder: the run folder, created if needed.
        data: where image sets are looked for.
        tensorboard: also write the metrics as TensorBoard events into the folder.
        family: the tasks, if ``recipe.task`` is no registered name: see
            :func:`~learned_optim.meta.meta_train`.
        test_family: those for the figures in the checkpoint; if not given, ``recipe.test_task``'s
            or, without one, ``family``.

    Raises:
        ValueError: the task cannot be meta-trained on (:func:`check_family`); the folder belongs to
            a run of another recipe, torch, release or source of tasks, or is damaged; or the
            checkpoint to start from belongs to another rule or to one of other sizes.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: DataOptions | None = None,
        tensorboard: bool = False,
        *,
        family: TaskFamily | None = None,
        test_family: TaskFamily | None = None,
    ) -> None:
        self.recipe, self.folder, self.tensorboard = recipe, Path(folder), tensorboard
        self.data = data or DataOptions()
        self.files = RunFolder(self.folder)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # Ranks share the tasks of a meta-step, or the pairs of perturbed runs of all its tasks.
        self.task_rank, self.task_world = (0, 1) if recipe.perturbs else (self.rank, self.world)
        if recipe.perturbs and recipe.pairs < self.world:
            raise ValueError(
                f"pairs={recipe.pairs} leave some of {self.world} ranks nothing to do: give each "
                f"one at least"
            )
        if recipe.tasks_per_meta_step % self.task_world:
            raise ValueError(
                f"tasks_per_meta_step={recipe.tasks_per_meta_step} cannot be shared evenly by "
                f"{self.world} ranks: make it a multiple"
            )
        if self.rank > 0:
            self.meet()  # rank 0 downloads what is missing, alone
        self._given = family
        self.family = family or build_tasks(recipe.task, TaskOptions("meta", self.data))
        self.training_family = self.family
        if recipe.rescale:
            self.training_family = Rescaled(self.family, recipe.rescale)
        self._test_family = test_family
        if test_family is None and recipe.test_task is None:
            self._test_family = family
        elif test_family is None:  # missing data fails now, not after the training
            build_tasks(self._test_task, TaskOptions("evaluation", self.data))
        if self.rank == 0:
            self.meet()
        check_family(self.family, recipe.task)
        if test_family is not None and test_family is not family:  # now, not after the training
            check_family(test_family, f"{recipe.task} (test)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.rule = rule_for(recipe.rule)
            self.kept = rule_for(recipe.rule)  # the moving average: what is validated and saved
        if recipe.estimator == "replay" and self.rule.rows == "none":
            raise ValueError(
                f"estimator 'replay' needs a rule that splits into observation and response, and "
                f"{self.rule.name!r} does not: use estimator='autograd' (--estimator autograd)"
            )
        self._start: str | None = None  # fingerprint of the weights before training, if learned
        if recipe.start is not None:
            self._start_from(recipe.start)
        self.kept.load_state_dict(self.rule.state_dict())
        self._first = {name: weight.clone() for name, weight in self.rule.state_dict().items()}
        self.meta_optimizer = torch.optim.Adam(self.rule.parameters(), lr=recipe.meta_lr)
        self.epoch = 0
        self.meta_steps = 0
        self.history: list[EpochMetrics] = []
        self._open_folder()

    def _start_from(self, source: str) -> None:
        start = load_rule(source)
        try:
            self.rule.init_from(start)
        except ValueError as error:
            raise ValueError(f"start={source!r} does not fit the recipe: {error}") from error
        self._start = start.fingerprint()

    @property
    def _test_task(self) -> str:
        return self.recipe.test_task or self.recipe.task

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch with the smallest validation."""
        return min(self.history, key=lambda m: m.validation, default=None)

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    # ---- the run folder

    def _open_folder(self) -> None:
        recipe = self.recipe
        classes = (type(self.rule), type(recipe.rule))
        named = [recipe.task] if self._given is None else []
        if self._test_family is None and self._test_task not in named:
            named.append(self._test_task)
        conditions = provenance.conditions(named, self.data, source_modules(*classes))
        conditions |= provenance.conditions_of_main(*classes)
        if self._given is not None:
            conditions |= provenance.conditions_of_given(recipe.task, self._given)
        if self._start is not None:
            conditions["weights of start"] = self._start
        conditions = self.files.check(recipe, conditions)
        saved = self.files.read_state()
        if saved is not None:
            self._load(saved)
        if self.rank == 0:
            self.files.begin(recipe, conditions)

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            ranks = saved.get("ranks", self.world)
            self.rule.load_state_dict(saved["rule"])
            self.kept.load_state_dict(saved["kept"])
            self.meta_optimizer.load_state_dict(saved["meta_optimizer"])
            self.epoch, self.meta_steps = saved["epoch"], saved["meta_steps"]
            self.history = [EpochMetrics(**line) for line in saved["history"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self.files.damaged(error) from error
        sampled = self.recipe.coordinates is not None and not self.recipe.perturbs
        if ranks != self.world and sampled:
            raise ValueError(
                f"{self.folder} holds a run of {ranks} ranks, and each draws its own sample of "
                f"coordinates: resume it with as many, not {self.world}"
            )

    def _save(self) -> None:
        """Best checkpoint first, resume state last: a kill in between repeats the epoch."""
        if self.rank != 0:
            return
        if self.best is self.history[-1]:
            save_rule(self.kept, self.files.best, self.record())
        history = [asdict(metrics) for metrics in self.history]
        state = {
            "rule": self.rule.state_dict(),
            "kept": self.kept.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "epoch": self.epoch,
            "meta_steps": self.meta_steps,
            "ranks": self.world,
            "history": history,
        }
        self.files.write_state(state, history)
        if self.tensorboard:
            self._write_events(self.history[-1])

    def _write_events(self, metrics: EpochMetrics) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard events need its package: pip install 'learned-optim[meta]'"
            ) from error
        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            for name, value in asdict(metrics).items():
                if name != "epoch":
                    writer.add_scalar(name, value, metrics.epoch)

    def finish(self, output: Path | None = None, report: Report | None = None) -> Path:
        """Test the best weights on fresh tasks and write the finished checkpoint.

        Args:
            output: where to; into the run folder, and named after it, if not given.
            report: told ``("test", runs done, runs in all)``.

        Returns:
            The file written. Its record holds the recipe, the commit, and the validation and test
            figures; test tasks come from the evaluation split and choose nothing.

        Raises:
            TrainingError: no epoch has a finite validation, so that no weights are worth keeping.
            CheckpointError: the best checkpoint of the folder is damaged.
        """
        if self.best is None or not math.isfinite(self.best.validation):
            raise TrainingError(
                f"none of the {self.epoch} epochs in {self.folder} has a finite validation loss: "
                f"there are no weights worth keeping. {ADVICE}"
            )
        rule, record = self._best_rule()
        record["recipe"] = self.recipe.to_json()
        if self.recipe.start_share:
            for name, weight in rule.state_dict().items():
                weight.lerp_(self._first[name], self.recipe.start_share)
            record["validation"] = self.validate(rule, report)
        family = self._test_family
        if family is None:
            family = build_tasks(self._test_task, TaskOptions("evaluation", self.data))
        seeds = [(self.recipe.seed, "test", i) for i in range(self.recipe.test_runs)]
        sums = self._summed(rule, family, list(seeds), "test", report)
        logs = sums.log()
        record["test"] = {
            "mean": sums.mean().item(),
            "std": sums.std().item(),
            "geometric_mean": logs.mean().exp().item(),
            "runs": len(sums),
            "task": self._test_task,
        }
        record |= {
            "epochs_run": self.epoch,
            "meta_steps": self.meta_steps,
            "data": self._data_read(),
            "torch": torch.__version__.split("+")[0],
        }
        path = output or self.files.finished
        save_rule(rule, path, record)
        return path

    def _data_read(self) -> str | dict[str, str]:
        """What the meta-training has read, for the checkpoint's header."""
        if self._given is None:
            return f"task family {self.recipe.task!r}, meta-training split alone"
        return provenance.conditions_of_given(self.recipe.task, self._given)

    def _best_rule(self) -> tuple[UpdateRule, dict[str, Any]]:
        try:
            return read_checkpoint(self.files.best)
        except (CheckpointError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{error}. To train again from epoch 1, delete the run folder {self.folder}"
            ) from error

    def record(self) -> dict[str, Any]:
        """How the kept weights were made, for the checkpoint's header."""
        best = self.best
        return {
            "recipe": self.recipe.to_json(),
            "commit": source_version(),
            "epoch": best.epoch if best else 0,
            "validation": best.validation if best else None,
            "dropped_unrolls": sum(m.dropped for m in self.history),
            "data_sets": list(self.family.data_sets),
            **({"start": self._start} if self._start else {}),
        }

    # ---- training

    def train(
        self,
        on_run: Callable[[int, int, float], None] | None = None,
        report: Report | None = None,
    ) -> None:
        """Run the remaining epochs.

        Args:
            on_run: told ``(epoch, run, meta_loss)`` after every optimizee run.
            report: told ``("validation", runs done, runs in all)``.

        Raises:
            TrainingError: every unroll of an epoch was dropped and its validation is not finite.
            ValueError: another process trains in the folder.
            OSError: a file cannot be written; the folder holds the last epoch before.
        """
        with self._alone():
            while self.epoch < self.recipe.epochs and not self._patience_is_over():
                self._train_epoch(self.epoch + 1, on_run, report)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other trainings out of the folder; of several ranks, the first does."""
        if self.rank > 0:
            yield
        else:
            with self.files.locked():
                yield

    def _train_epoch(
        self,
        epoch: int,
        on_run: Callable[[int, int, float], None] | None,
        report: Report | None,
    ) -> None:
        started = time.perf_counter()
        sums, dropped = [], 0
        for run in range(self.recipe.runs_per_epoch):
            meta_loss, lost = self._train_run(epoch, run)
            sums.append(meta_loss)
            dropped += lost
            if on_run is not None:
                on_run(epoch, run, meta_loss)
        finite = [s for s in sums if math.isfinite(s)]
        validation = self.validate(report=report)
        if not finite and not math.isfinite(validation):
            raise TrainingError(
                f"epoch {epoch} taught nothing: all of its {dropped} unrolls met a loss or a "
                f"gradient that is not finite, and so did validation. {ADVICE}. {self.folder} "
                f"holds the {self.epoch} epochs before"
            )
        previous = self.best.validation if self.best else math.inf
        metrics = EpochMetrics(
            epoch=epoch,
            meta_loss=sum(finite) / len(finite) if finite else math.inf,
            validation=validation,
            best=min(previous, validation),
            dropped=dropped,
            meta_lr=self.meta_optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )
        self.epoch = epoch
        self.history.append(metrics)
        self._save()

    def _patience_is_over(self) -> bool:
        best, patience = self.best, self.recipe.patience
        return best is not None and patience is not None and self.epoch - best.epoch >= patience

    def _train_run(self, epoch: int, run: int) -> tuple[float, int]:
        """One optimizee run, a meta-step per unroll: its mean summed loss, and unrolls dropped."""
        with global_generator_seeded(self.recipe.seed, "forward", epoch, run, self.task_rank):
            return self._unrolls(epoch, run)

    def _unrolls(self, epoch: int, run: int) -> tuple[float, int]:
        recipe = self.recipe
        share = range(self.task_rank, recipe.tasks_per_meta_step, self.task_world)
        generators = [seeded(recipe.seed, "train", epoch, run, task) for task in share]
        tasks = [self.training_family.sample(generator) for generator in generators]
        stackable = self.training_family.stackable
        optimizees = Optimizees(self.rule, tasks, generators, stacked=stackable)
        options = self._estimator_options(epoch, run)
        estimate = ESTIMATORS[recipe.estimator]
        plan = Plan.draw(recipe, epoch, seeded(recipe.seed, "plan", epoch, run))
        total, done = 0.0, 0
        unrolls = sum(learns for _, learns in plan.unrolls)
        runs_before = (epoch - 1) * recipe.runs_per_epoch + run
        for steps, learns in plan.unrolls:
            if not learns:
                for _ in range(steps):
                    total += optimizees.advance(self.rule).mean().item()
                continue
            weights = loss_weights(recipe, optimizees.step, plan.length)
            options = replace(options, weights=weights)
            meta = estimate(self.rule, optimizees, steps, options)
            packed = torch.cat(
                [g.flatten() for g in meta.grads] + [meta.losses.mean(1).sum()[None]]
            )
            if self.task_world > 1:
                dist.all_reduce(packed)
                packed /= self.task_world
            if not torch.isfinite(packed).all():
                # Averaging it in would poison the weights, and the optimizee will not recover.
                return math.inf, 1
            unroll_loss = packed[-1].item()
            total += unroll_loss
            if recipe.relative_loss:
                packed /= max(unroll_loss / steps, SMALLEST_LOSS)
            every = recipe.epochs * recipe.runs_per_epoch * unrolls
            self._meta_step(packed[:-1], (runs_before * unrolls + done) / every)
            done += 1
        # Per horizon, so that runs of different lengths compare.
        return total * recipe.horizon / sum(steps for steps, _ in plan.unrolls), 0

    def _estimator_options(self, epoch: int, run: int) -> EstimatorOptions:
        """Of one run; their generator, and what is imitated, go on from unroll to unroll."""
        recipe = self.recipe
        return EstimatorOptions(
            coordinates=recipe.coordinates,
            generator=seeded(recipe.seed, "coordinates", epoch, run, self.task_rank),
            sampling=recipe.sampling,
            fitness=recipe.fitness,
            pairs=recipe.pairs,
            sigma=recipe.sigma,
            compression=recipe.compression,
            compression_unit=recipe.compression_unit,
            imitation=imitation(recipe, epoch),
            rank=self.rank,
            world=self.world,
        )

    def _meta_step(self, flat_grad: Tensor, progress: float) -> None:
        """Clip, step, average; ``progress`` is the share of the whole training done before."""
        recipe = self.recipe
        if recipe.clip_norm is not None:
            flat_grad = flat_grad * (recipe.clip_norm / (flat_grad.norm() + 1e-12)).clamp(max=1.0)
        weights = list(self.rule.parameters())
        parts = flat_grad.split([w.numel() for w in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight).clone()
        for group in self.meta_optimizer.param_groups:
            group["lr"] = self._meta_lr(progress)
        self.meta_optimizer.step()
        self.meta_steps += 1
        with torch.no_grad():
            for kept, weight in zip(self.kept.parameters(), weights, strict=True):
                kept.lerp_(weight, 1.0 - recipe.average)

    def _meta_lr(self, progress: float) -> float:
        """Cosine from ``meta_lr`` to ``meta_lr_final`` over the whole training, or constant."""
        recipe = self.recipe
        if recipe.meta_lr_final is None:
            return recipe.meta_lr
        swing = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return recipe.meta_lr_final + (recipe.meta_lr - recipe.meta_lr_final) * swing

    @torch.no_grad()
    def validate(self, rule: UpdateRule | None = None, report: Report | None = None) -> float:
        """Mean summed loss over the validation runs, of the kept weights unless a rule is given.

        Infinite if it is not finite.

        Args:
            rule: whose loss, if not that of the kept weights.
            report: told ``("validation", runs done, runs in all)``.
        """
        seeds: list[tuple[object, ...]] = [
            (self.recipe.seed, "validation", i) for i in range(self.recipe.validation_runs)
        ]
        sums = self._summed(
            rule or self.kept,
            self.family,
            seeds[self.rank :: self.world],
            "validation",
            report,
        )
        geometric = self.recipe.validation_mean == "geometric"
        total = (sums.double().log() if geometric else sums.double()).sum()
        if self.world > 1:
            dist.all_reduce(total)
        mean = total.item() / len(seeds)
        if not math.isfinite(mean):
            return math.inf
        return math.exp(mean) if geometric else mean

    def _summed(
        self,
        rule: UpdateRule,
        family: TaskFamily,
        seeds: list[tuple[object, ...]],
        what: str,
        report: Report | None,
    ) -> Tensor:
        if not seeds:
            return torch.zeros(0)
        together = max(8, self.recipe.tasks_per_meta_step) if family.stackable else 1
        horizon = self.recipe.validation_horizon or self.recipe.horizon

        def on_runs(done: int) -> None:
            if report is not None:
                report(what, done, len(seeds))

        return summed_losses(rule, family, horizon, seeds, together, on_runs)


def source_version() -> str:
    """The commit of the source tree this package is run from, or the installed version."""
    from learned_optim import __version__

    def git(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=environment,
        )
        return done.stdout.strip()

    try:
        # Installed inside somebody else's repository, the package is not among its files.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12") or __version__
    except (OSError, subprocess.SubprocessError):
        return __version__
