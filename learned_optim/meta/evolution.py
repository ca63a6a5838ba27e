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
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from learned_optim.checkpoint import save_rule
from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta import provenance
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.evolution_validation import Excess, references, validate
from learned_optim.meta.populations import TRAINED_FOR
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.run_folder import RunFolder, source_modules
from learned_optim.meta.trainer import Report, TrainingError, source_version
from learned_optim.pretrained import load_rule
from learned_optim.rules import UpdateRule, rule_for

__all__ = ["EvolutionRecipe", "EvolutionTrainConfig", "EvolutionTrainer"]

_BETA, _SQUARE_BETA, _EPS = 0.9, 0.99, 1e-8
_AVERAGE_SHARE = 0.02  # the moving average is a plain mean until a step has this share of it
_STATE = ("theta", "m", "v", "ema")
# Metrics of a recipe without meta-steps.
_NO_STEP = {
    "meta_step": 0,
    "meta_lr": 0.0,
    "gradient_norm": 0.0,
    "tasks": [],
    "skipped": [],
    "seconds": 0.0,
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
    data: DataOptions = field(default_factory=DataOptions)
    """Where image sets are looked for."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def initial_weights(rule: UpdateRule, seed: int, start: str = "") -> Tensor:
    """Weights before training as one vector, float32, in the order of ``rule.parameters()``.

    Those of the horizon rule's hidden layer are normal and all others zero; those of other rules
    are what their constructors draw. With a checkpoint to start from, they are its.

    Raises:
        ValueError: the checkpoint's rule is of another kind, or larger.
    """
    if start:
        return _extended(load_rule(start), rule, start)
    if rule.name == "horizon":
        first = next(rule.parameters())  # (units, features)
        weights = torch.zeros(sum(p.numel() for p in rule.parameters()))
        normal = torch.randn(first.numel(), generator=torch.Generator().manual_seed(seed))
        weights[: first.numel()] = normal / math.sqrt(first.shape[1])
        return weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parameters_to_vector(rule_for(rule.config).parameters()).detach().clone()


def _extended(old: UpdateRule, rule: UpdateRule, source: str) -> Tensor:
    """The weights of ``old`` as those of ``rule``, whose further inputs have weights of zero."""
    wanted = dict(rule.named_parameters())
    if old.name != rule.name or any(p.dim() != wanted[n].dim() for n, p in old.named_parameters()):
        raise ValueError(f"start {source!r} holds the rule {old.name!r}, not {rule.name!r}")
    weights = []
    for name, weight in old.named_parameters():
        missing = [b - a for a, b in zip(weight.shape, wanted[name].shape, strict=True)]
        if any(missing[:-1]) or (missing and missing[-1] < 0):
            raise ValueError(
                f"start {source!r} has {name} of shape {tuple(weight.shape)}, which does not "
                f"extend to {tuple(wanted[name].shape)}: only further inputs can be added"
            )
        weights.append(torch.nn.functional.pad(weight.detach().float(), (0, missing[-1])))
    return parameters_to_vector(weights)


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
        data: where MNIST is looked for.

    Raises:
        ValueError: the rule has no weights or reads the loss; or the folder belongs to a run of
            another recipe, torch or release, or is damaged.

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
    ) -> None:
        self.recipe, self.folder, self.workers = recipe, Path(folder), workers
        self.data = data or DataOptions()
        self.files = RunFolder(self.folder)
        self.rule = _trainable(rule_for(recipe.rule))
        # Adam's notation: weights, first and second moments; and the average of the weights.
        self.theta = initial_weights(self.rule, recipe.seed, recipe.start)
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.ema = self.theta.clone()
        self.meta_steps = 0
        self.history: list[dict[str, Any]] = []
        modules = source_modules(type(self.rule), type(recipe.rule))
        conditions = self.files.check(recipe, provenance.conditions([], self.data, modules))
        saved = self.files.read_state()
        if saved is not None:
            self._load(saved)
        self.files.begin(recipe, conditions)

    # ---- the run folder

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
        vector_to_parameters((self.ema if weights is None else weights).clone(), rule.parameters())
        return rule

    def last_validation(self) -> dict[str, Any] | None:
        """Its ``meta_step``, and the figures of the ``last`` and the ``average`` weights."""
        validated = self._validated()
        if not validated:
            return None
        return {"meta_step": validated[-1]["meta_step"], **validated[-1]["validation"]}

    def record(self) -> dict[str, Any]:
        """How the averaged weights were made, for the checkpoint's header."""
        return {
            "recipe": self.recipe.to_json(),
            "commit": source_version(),
            "meta_steps": self.meta_steps,
            "skipped_tasks": sum(len(line["skipped"]) for line in self.history),
            # Mean log of the final loss minus that of tuned AdamW.
            "behind_adamw": self.last_validation(),
            "data": f"mixture {self.recipe.task}; MNIST's meta half is all real data in it",
            "trained_for": TRAINED_FOR[self.recipe.task],
            "torch": torch.__version__.split("+")[0],
        }

    def finish(self, output: Path | None = None) -> Path:
        """Write the finished checkpoint: averaged weights, the start's share in them, the record.

        Args:
            output: where to; into the run folder, and named after it, if not given.
        """
        path = output or self.files.finished
        start = initial_weights(self.rule, self.recipe.seed, self.recipe.start)
        save_rule(self.kept(self.ema.lerp(start, self.recipe.start_share)), path, self.record())
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
        load_images("mnist", True, self.data)  # now, not in a worker; downloads what is missing
        with self.files.locked(), jobs.worker_map(self.workers) as run:
            while self.meta_steps < self.recipe.meta_steps or not self.history:
                metrics = self._meta_step(run) if self.recipe.meta_steps else dict(_NO_STEP)
                every = self.recipe.validation_every
                if self.meta_steps % every == 0 or self.meta_steps == self.recipe.meta_steps:
                    metrics["validation"] = self._validate(run, report)
                self.history.append(metrics)
                self._save()
                if on_step is not None:
                    on_step(metrics)

    def _meta_step(self, run: jobs.Map) -> dict[str, Any]:
        recipe, started = self.recipe, time.perf_counter()
        first = 100_000 * (recipe.seed + 1) + self.meta_steps * recipe.tasks_per_meta_step
        todo = [
            jobs.TaskJob(first + index, self.theta, recipe, self.data, self._is_large(index))
            for index in range(recipe.tasks_per_meta_step)
        ]
        results = list(run(jobs.run_task, todo))
        gradient, used = jobs.meta_gradient(results, recipe.pairs, len(self.theta))
        if not used:
            why = next((r.error for r in results if r.error), "no fitness was finite")
            raise TrainingError(
                f"meta-step {self.meta_steps + 1} taught nothing: none of its "
                f"{len(results)} tasks gave a finite fitness ({why}). {self.folder} holds the "
                f"{self.meta_steps} meta-steps before"
            )
        meta_lr = self._meta_lr()
        self.meta_steps += 1
        self._follow(gradient, meta_lr)
        skipped = [r for r in results if r not in used]
        return {
            "meta_step": self.meta_steps,
            "meta_lr": meta_lr,
            "gradient_norm": gradient.norm().item(),
            "tasks": [result.metrics() for result in used],
            "skipped": [result.failure() for result in skipped],
            "seconds": time.perf_counter() - started,
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

    def compute_references(self, report: Report | None = None) -> list[jobs.Reference]:
        """Run tuned AdamW on the validation tasks ahead of training; see :func:`references`."""
        load_images("mnist", True, self.data)
        with self.files.locked(), jobs.worker_map(self.workers) as run:
            return self._references(run, report)

    def _references(self, run: jobs.Map, report: Report | None) -> list[jobs.Reference]:
        return references(
            self.folder, self.recipe.validation_tasks, self.recipe.task, self.data, run, report
        )

    def _validate(self, run: jobs.Map, report: Report | None) -> dict[str, Excess]:
        found = self._references(run, report)
        weights = {"last": self.theta, "average": self.ema}
        return validate(weights, self.recipe.rule, self.recipe.task, found, self.data, run, report)


def _trainable(rule: UpdateRule) -> UpdateRule:
    """The rule, if runs of populations can train it.

    Raises:
        ValueError: it has no weights, or reads the loss.
    """
    if not list(rule.parameters()):
        raise ValueError(f"rule {rule.name!r} has no weights to train")
    if rule.needs_loss:
        raise ValueError(
            f"rule {rule.name!r} reads the loss, which evolution strategies do not hand to it: "
            f"configure it without, or train it by a recipe of backpropagation"
        )
    return rule
