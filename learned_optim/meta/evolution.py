"""Meta-training by antithetic evolution strategies on whole runs.

Every meta-step draws tasks, and for each task pairs of opposite perturbations of the rule's weights
(Salimans et al. 2017, arXiv 1703.03864). All perturbed rules of a task train side by side, on the
same batches, from the first step to the last, so nothing is truncated: a rule is judged by where a
run ends. The difference of a pair's fitness, in log loss, is compressed by ``asinh``, because one
run that diverges must not outweigh all others; the gradient of the weights is the mean over pairs
of difference times direction. Adam follows it, and a moving average of the weights is what is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from learned_optim.checkpoint import save_rule
from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta import provenance
from learned_optim.meta.checks import check_family
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.evolution_tasks import RunSource
from learned_optim.meta.evolution_validation import Excess, ratio_to_adamw, references, validate
from learned_optim.meta.evolution_weights import initial_weights, trainable
from learned_optim.meta.populations import TRAINED_FOR
from learned_optim.meta.progress import Report, TrainingError, event_writer, seconds_left
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.references import Reference
from learned_optim.meta.run_folder import RunFolder, source_modules
from learned_optim.meta.tasks import TaskFamily
from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for

__all__ = ["EvolutionRecipe", "EvolutionTrainConfig", "EvolutionTrainer"]

_BETA, _SQUARE_BETA, _EPS = 0.9, 0.99, 1e-8
_AVERAGE_SHARE = 0.02  # the moving average is a plain mean until a step has this share of it
_STATE = ("theta", "m", "v", "ema")
# Metrics of a recipe without meta-steps.
_NO_STEP: dict[str, Any] = {
    "meta_step": 0,
    "meta_lr": 0.0,
    "gradient_norm": 0.0,
    "tasks": [],
    "skipped": [],
    "seconds": 0.0,
    "runs_per_second": None,
}


@dataclass(frozen=True)
class EvolutionTrainConfig:
    """Meta-train an update rule; an interrupted run goes on when started again."""

    recipe: EvolutionRecipe
    folder: Path = Path("runs")
    """Run folder: metrics, best checkpoint, resume state."""
    output: Path | None = None
    """Where the finished checkpoint goes; into the run folder if not given."""
    workers: int = 1
    """Processes that share the tasks of a meta-step, a core each."""
    references_only: bool = False
    """Only run tuned AdamW on the validation tasks, and stop."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where image sets are looked for."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


class EvolutionTrainer:
    """Runs a recipe in a folder; a second trainer on the same folder goes on where it stopped.

    The folder holds ``recipe.json``, ``protocol.json`` (versions), ``metrics.jsonl`` (one line per
    meta-step), ``references.json`` (tuned AdamW on the validation tasks), ``best.safetensors``
    (best by validation) and ``resume.pt``. A kill loses at most the current meta-step, and a
    resumed run gives the same bits as an uninterrupted one, with any number of workers.

    Args:
        recipe: what to train.
        folder: the run folder, created if needed.
        workers: processes that share the tasks of a meta-step.
        data: where image sets are looked for.
        tensorboard: also write the metrics as TensorBoard events into the folder.
        family: the tasks, if ``recipe.task`` is no registered name: see
            :func:`~learned_optim.meta.meta_train`.

    Raises:
        ValueError: the rule has no weights or reads the loss; the task cannot be meta-trained on
            (:func:`check_family`); or the folder belongs to a run of another recipe, torch, release
            or source of tasks, or is damaged.

    Attributes:
        meta_steps: how many are done.
        history: the metrics of each.
    """

    def __init__(
        self,
        recipe: EvolutionRecipe,
        folder: Path,
        workers: int = 1,
        data: DataOptions | None = None,
        tensorboard: bool = False,
        *,
        family: TaskFamily | None = None,
    ) -> None:
        self.recipe, self.folder, self.workers = recipe, Path(folder), workers
        self.data, self.tensorboard = data or DataOptions(), tensorboard
        self.source = RunSource.of(recipe, self.data)
        self._given = family
        if not self.source.is_mixture:
            check_family(family or self.source.family(), recipe.task)
        self.files = RunFolder(self.folder)
        self.rule = trainable(rule_for(recipe.rule))
        # Adam's notation: weights, first and second moments; and the average of the weights.
        self.theta = initial_weights(self.rule, recipe.seed, recipe.start)
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.ema = self.theta.clone()
        self.meta_steps = 0
        self.history: list[dict[str, Any]] = []
        conditions = self.files.check(recipe, self._conditions())
        saved = self.files.read_state()
        if saved is not None:
            self._load(saved)
        self.files.begin(recipe, conditions)

    # ---- the run folder

    def _conditions(self) -> dict[str, str]:
        """What the run depends on besides the recipe."""
        classes = (type(self.rule), type(self.recipe.rule))
        named = [] if self.source.is_mixture or self._given else [self.recipe.task]
        found = provenance.conditions(named, self.data, source_modules(*classes))
        found |= provenance.conditions_of_main(*classes)
        if self._given is not None:
            found |= provenance.conditions_of_given(self.recipe.task, self._given)
        if self.recipe.start:
            found["weights of start"] = load_rule(self.recipe.start).fingerprint()
        return found

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            for name in _STATE:
                shape = tuple(saved[name].shape)
                if shape != self.theta.shape:
                    raise ValueError(f"{name} has shape {shape}, not {tuple(self.theta.shape)}")
                setattr(self, name, saved[name].float())
            self.meta_steps = int(saved["k"])
            self.history = list(saved.get("history", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.files.damaged(error) from error

    def _save(self) -> None:
        """Best checkpoint first, resume state last: a kill in between repeats the meta-step."""
        if self._best_is_last():
            save_rule(self.kept(), self.files.best, self.record())
        state = {name: getattr(self, name) for name in _STATE}
        self.files.write_state(
            {**state, "k": self.meta_steps, "history": self.history}, self.history
        )

    def _best_is_last(self) -> bool:
        means = [line["validation"]["average"]["mean"] for line in self._validated()]
        return "validation" in self.history[-1] and means[-1] == min(means)

    def _validated(self) -> list[dict[str, Any]]:
        return [line for line in self.history if "validation" in line]

    def kept(self, weights: Tensor | None = None) -> UpdateRule:
        """The rule with these weights, or with the averaged ones."""
        rule = rule_for(self.recipe.rule)
        rule.warmup_steps, rule.trained_steps = 0, self.source.longest_run
        vector_to_parameters((self.ema if weights is None else weights).clone(), rule.parameters())
        return rule

    def last_validation(self) -> dict[str, Any] | None:
        """Its ``meta_step``, and the figures of the ``average`` of the weights, which is kept."""
        validated = self._validated()
        if not validated:
            return None
        return {"meta_step": validated[-1]["meta_step"], **validated[-1]["validation"]}

    def record(self) -> dict[str, Any]:
        """How the averaged weights were made, for the checkpoint's header."""
        validation = self.last_validation()
        return {
            "recipe": self.recipe.to_json(),
            "commit": provenance.source_version(),
            "meta_steps": self.meta_steps,
            "skipped_tasks": sum(len(line["skipped"]) for line in self.history),
            # Mean log of the final loss minus that of tuned AdamW.
            "behind_adamw": validation,
            "ratio_to_adamw": ratio_to_adamw(validation) if validation else None,
            **self._trained_on(),
            "torch": torch.__version__.split("+")[0],
        }

    def _trained_on(self) -> dict[str, Any]:
        """What the training has read and for what runs, for the checkpoint's header."""
        task = self.recipe.task
        if self.source.is_mixture:
            data = f"mixture {task}; MNIST's meta half is all real data in it"
            return {"data": data, "trained_for": TRAINED_FOR[task]}
        family = self._given or self.source.family()
        trained_for = f"runs of {self.source.horizons} steps of {task}"
        data_sets = list(family.data_sets)
        if self._given is None:
            data = f"task family {task!r}, meta-training split alone"
            return {"data": data, "data_sets": data_sets, "trained_for": trained_for}
        given = provenance.conditions_of_given(task, family)
        return {"data": given, "data_sets": data_sets, "trained_for": trained_for}

    def finish(self, output: Path | None = None) -> Path:
        """Write the finished checkpoint: averaged weights and their record.

        Args:
            output: where to; into the run folder, and named after it, if not given.
        """
        path = output or self.files.finished
        save_rule(self.kept(), path, self.record())
        return path

    # ---- training

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        report: Report | None = None,
    ) -> None:
        """Run the remaining meta-steps.

        Args:
            on_step: told the metrics of every meta-step.
            report: told ``("references" or "validation", runs done, runs in all)``.

        Raises:
            TrainingError: no task of a meta-step gave a finite fitness.
            FileNotFoundError: MNIST is not there.
            ValueError: another process trains in the folder.
            OSError: a file cannot be written; the folder holds the last meta-step before.
        """
        self._load_data()
        with (
            self.files.locked(),
            jobs.worker_map(self.workers, self._given) as run,
            event_writer(self.folder, self.tensorboard) as write,
        ):
            while self.meta_steps < self.recipe.meta_steps or not self.history:
                metrics = self._meta_step(run) if self.recipe.meta_steps else dict(_NO_STEP)
                if self._validates_after(self.meta_steps):
                    started = time.perf_counter()
                    metrics["validation"] = self._validate(run, report)
                    metrics["validation_seconds"] = time.perf_counter() - started
                    metrics["ratio_to_adamw"] = ratio_to_adamw(metrics["validation"])
                self.history.append(metrics)
                metrics["seconds_left"] = self._seconds_left()
                self._save()
                write(self.meta_steps, event_values(metrics))
                if on_step is not None:
                    on_step(metrics)

    def _load_data(self) -> None:
        """Now, not in a worker; what is missing is downloaded."""
        if self.source.is_mixture:
            load_images("mnist", True, self.data)

    def _seconds_left(self) -> float:
        """Of the remaining meta-steps and validations, if they take as long as the last ones."""
        remaining = range(self.meta_steps + 1, self.recipe.meta_steps + 1)
        left = seconds_left([line["seconds"] for line in self.history], len(remaining))
        name = "validation_seconds"
        taken = [line[name] for line in self.history if name in line]
        if taken:
            # The first is no measure of the others: it also runs tuned AdamW.
            left += seconds_left(taken[1:] or taken, sum(map(self._validates_after, remaining)))
        return left

    def _validates_after(self, meta_step: int) -> bool:
        return meta_step % self.recipe.validation_every == 0 or meta_step == self.recipe.meta_steps

    def _meta_step(self, run: jobs.Map) -> dict[str, Any]:
        recipe, started = self.recipe, time.perf_counter()
        step = self.meta_steps + 1
        first = 100_000 * (recipe.seed + 1) + self.meta_steps * recipe.tasks_per_meta_step
        todo = [
            jobs.TaskJob(
                jobs.training_seed(first + index),
                self.theta,
                recipe,
                self.source,
                self._is_large(index),
            )
            for index in range(recipe.tasks_per_meta_step)
        ]
        results = list(run(jobs.run_task, todo))
        gradient, used = jobs.meta_gradient(results, recipe.pairs, len(self.theta))
        if not used:
            why = next((r.error for r in results if r.error), "no fitness was finite")
            raise TrainingError(
                f"meta-step {step} taught nothing: none of its "
                f"{len(results)} tasks gave a finite fitness ({why}). {self.folder} holds the "
                f"{self.meta_steps} meta-steps before"
            )
        meta_lr = self._meta_lr()
        self.meta_steps = step
        self._follow(gradient, meta_lr)
        seconds, runs = time.perf_counter() - started, 2 * recipe.pairs * len(results)
        skipped = [r for r in results if r not in used]
        return {
            "meta_step": self.meta_steps,
            "meta_lr": meta_lr,
            "gradient_norm": gradient.norm().item(),
            "tasks": [result.metrics() for result in used],
            "skipped": [result.failure() for result in skipped],
            "seconds": seconds,
            "runs_per_second": runs / seconds,
        }

    def _is_large(self, index: int) -> bool:
        """Whether the task with this index in the next meta-step is a larger one."""
        recipe = self.recipe
        large = recipe.large_share * recipe.tasks_per_meta_step
        return self.meta_steps >= recipe.large_from and index < round(large)

    def _meta_lr(self) -> float:
        """Of the next meta-step: a cosine over all of them."""
        recipe = self.recipe
        swing = 1 + math.cos(math.pi * self.meta_steps / recipe.meta_steps)
        return recipe.meta_lr_final + (recipe.meta_lr - recipe.meta_lr_final) * 0.5 * swing

    def _follow(self, gradient: Tensor, meta_lr: float) -> None:
        """Adam's step number :attr:`meta_steps`, and the average."""
        step = self.meta_steps
        self.m = self.m.lerp(gradient, 1 - _BETA)
        self.v = (self.v * _SQUARE_BETA).addcmul(gradient, gradient, value=1 - _SQUARE_BETA)
        mean, square = self.m / (1 - _BETA**step), self.v / (1 - _SQUARE_BETA**step)
        self.theta = self.theta - meta_lr * mean / (square.sqrt() + _EPS)
        self.ema = self.ema.lerp(self.theta, max(_AVERAGE_SHARE, 1 / (step + 1)))

    # ---- validation

    def compute_references(self, report: Report | None = None) -> list[Reference]:
        """Run tuned AdamW on the validation tasks ahead of training; see :func:`references`."""
        self._load_data()
        with self.files.locked(), jobs.worker_map(self.workers, self._given) as run:
            return self._references(run, report)

    def _references(self, run: jobs.Map, report: Report | None) -> list[Reference]:
        return references(self.folder, self.recipe.validation_tasks, self.source, run, report)

    def _validate(self, run: jobs.Map, report: Report | None) -> dict[str, Excess]:
        found = self._references(run, report)
        return validate({"average": self.ema}, self.recipe.rule, self.source, found, run, report)


def event_values(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Numbers of a meta-step, for TensorBoard."""
    names = ("meta_lr", "gradient_norm", "ratio_to_adamw", "runs_per_second", "seconds_left")
    used = metrics["tasks"]
    return {
        **{name: metrics.get(name) for name in names},
        "fitness": sum(task["fitness"] for task in used) / len(used) if used else None,
        "skipped": float(len(metrics["skipped"])),
    }
