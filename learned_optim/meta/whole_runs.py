"""Meta-training by antithetic evolution strategies on whole runs.

Every meta-step draws tasks, and for each task pairs of opposite perturbations of the rule's weights
(Salimans et al. 2017, arXiv 1703.03864). All perturbed rules of a task train side by side, on the
same batches, from the first step to the last: nothing is truncated, and fitness is mostly where a
run ends. Differences of a pair's fitness, in log loss, are compressed by ``asinh``, so that one
diverging run does not outweigh all others. The gradient of the weights is the mean over pairs of
difference times direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.evolution_runs import (
    RunMap,
    Runs,
    meta_gradient,
    training_seed,
    workers,
)
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Method, Report, Round, Validation
from learned_optim.meta.populations import TRAINED_FOR
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.tasks import TaskFamily
from learned_optim.meta.validation import Reference, read_references, write_references
from learned_optim.rules import UpdateRule

# Bound on the excess of a task, in log loss behind tuned AdamW, in the mean over tasks.
_LARGEST_EXCESS = 1.5


class WholeRuns(Method):
    """Meta-steps on whole runs; validation tells how far runs end behind tuned AdamW.

    Args:
        recipe: what to train, and how.
        data: where images are looked for.
        folder: the run folder, where AdamW's scores are kept.
        workers: processes that share the tasks of a meta-step.
        family: the tasks, if they have no registered name.
    """

    unit, keeps_best = "meta-step", False
    average = 0.98
    betas = (0.9, 0.99)  # gradients of few tasks are noisy, and their size changes fast

    def __init__(
        self,
        recipe: EvolutionRecipe,
        data: DataOptions,
        folder: Path,
        workers: int,
        family: TaskFamily | None,
    ) -> None:
        if dist.is_torchelastic_launched():
            raise ValueError(
                "evolution strategies share work among processes of one machine: start them "
                "without torchrun, with workers"
            )
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.recipe, self.data, self.folder, self.workers = recipe, data, folder, workers
        self.task, self.given, self.rounds = recipe.task, family, recipe.meta_steps
        self.runs = Runs(recipe, data, family)
        self.family, self.longest_run = self.runs.family, self.runs.longest_run
        self.registered = [] if family else [recipe.task]
        self._map: RunMap = self._map_here

    def _map_here(self, method: Callable[[Runs, Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(partial(method, self.runs), jobs)

    def check_rule(self, rule: UpdateRule) -> None:
        if not list(rule.parameters()):
            raise ValueError(f"rule {rule.name!r} has no weights to train")
        if rule.needs_loss:
            raise ValueError(
                f"rule {rule.name!r} reads the loss, which evolution strategies do not hand to it: "
                f"configure it without, or train it by a recipe of backpropagation"
            )

    @contextmanager
    def session(self, report: Report) -> Iterator[None]:
        if self.family is None:
            load_images("mnist", True, self.data)  # now, not in a worker
        if self.workers == 1:
            yield
            return
        with workers(self.workers, self.recipe, self.data, self.given) as self._map:
            try:
                yield
            finally:
                self._map = self._map_here

    # ---- training

    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        recipe, weights = self.recipe, optimizer.weights
        first = 100_000 * (recipe.seed + 1) + (number - 1) * recipe.tasks_per_meta_step
        # Small networks teach the most per second, and users' are larger.
        large = round(recipe.large_share * recipe.tasks_per_meta_step)
        if number <= recipe.large_from:
            large = 0
        jobs = [
            (training_seed(first + i), weights, i < large)
            for i in range(recipe.tasks_per_meta_step)
        ]
        results = list(self._map(Runs.train, jobs))
        gradient, used = meta_gradient(results, recipe.pairs, len(weights))
        why = next((r.error for r in results if r.error), "no fitness was finite")
        if used:
            optimizer.step(gradient, (number - 1) / self.rounds)
        skipped = [result for result in results if result not in used]
        failures = [{"seed": r.seed, "family": r.family, "error": r.error} for r in skipped]
        details = {"gradient_norm": gradient.norm().item(), "skipped": failures}
        values = [result.fitness.mean().item() for result in used if result.fitness is not None]
        fitness = sum(values) / len(values) if values else math.inf
        why = f"none of its {len(results)} tasks gave a finite fitness ({why})"
        return Round(fitness, len(skipped), why, 2 * recipe.pairs * len(results), details)

    # ---- validation

    def validates_after(self, number: int) -> bool:
        return number % self.recipe.validation_every == 0 or number == self.rounds

    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Log of the final loss minus that of tuned AdamW on the same runs.

        Figures are the ``mean`` over tasks, each counting at most 1.5, and ``share_ahead``, the
        share of tasks on which the rule ends below AdamW.
        """
        weights = parameters_to_vector(rule.parameters()).detach()
        against, excess = self.references(report), []
        scores = self._map(Runs.validate, [(found.index, weights) for found in against])
        for reference, score in zip(against, scores, strict=True):
            excess.append(score - reference.best)
            report(f"validation {len(excess)}/{len(against)}")
        found = torch.tensor(excess, dtype=torch.float64)  # (tasks,)
        mean = found.clamp(max=_LARGEST_EXCESS).mean().item()
        figures = {"mean": mean, "share_ahead": (found < 0).double().mean().item()}
        value, ratio = (mean, math.exp(mean)) if math.isfinite(mean) else (math.inf, None)
        return Validation(value, ratio, {"behind_adamw": {"average": figures}})

    def references(self, report: Report) -> list[Reference]:
        """Tuned AdamW on the validation tasks; references that the folder lacks are run.

        Raises:
            ValueError: ``references.json`` is damaged.
        """
        count = self.recipe.validation_tasks
        found = {reference.index: reference for reference in read_references(self.folder)}
        missing = [index for index in range(count) if index not in found]
        for reference in self._map(Runs.reference, missing):
            found[reference.index] = reference
            write_references(self.folder, [found[index] for index in sorted(found)])
            report(f"AdamW {len(found)}/{count}")
        return [found[index] for index in range(count)]

    # ---- the record

    def trained_on(self) -> dict[str, Any]:
        if self.family is None:
            data = f"mixture {self.task}; MNIST's meta half is all real data in it"
            return {"data": data, "trained_for": TRAINED_FOR[self.task]}
        trained_for = f"runs of {self.recipe.horizon} steps of {self.task}"
        return {**super().trained_on(), "trained_for": trained_for}

    def summary(self, record: dict[str, Any]) -> str:
        average = record["behind_adamw"]["average"]
        return (
            f"final loss on {self.recipe.validation_tasks} validation runs: "
            f"{math.exp(average['mean']):.2f} of tuned AdamW's (geometric mean), ahead on "
            f"{average['share_ahead']:.0%}"
        )
