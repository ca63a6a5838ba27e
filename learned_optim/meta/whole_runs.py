"""Meta-training by antithetic evolution strategies on whole runs.

Every meta-step draws tasks, and for each task pairs of opposite perturbations of the rule's weights
(Salimans et al. 2017, arXiv 1703.03864). All perturbed rules of a task train side by side, on the
same batches, from the first step to the last, so nothing is truncated: a rule is judged by where a
run ends. The difference of a pair's fitness, in log loss, is compressed by ``asinh``, because one
run that diverges must not outweigh all others; the gradient of the weights is the mean over pairs
of difference times direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from learned_optim.meta import evolution_jobs as jobs
from learned_optim.meta import provenance
from learned_optim.meta.data import DataOptions, load_images
from learned_optim.meta.evolution_tasks import RunSource, given_family
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.method import Method, Round, Validation
from learned_optim.meta.populations import TRAINED_FOR
from learned_optim.meta.progress import Report
from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.meta.references import (
    Reference,
    best_score,
    read_references,
    write_references,
)
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import UpdateRule

# Adam's decays: gradients of few tasks are noisy, and their size changes fast.
_BETAS = (0.9, 0.99)
# Decay of the average that is kept.
_AVERAGE = 0.98
# A task counts at most this much, in log loss behind tuned AdamW.
_LARGEST_EXCESS = 1.5


class WholeRuns(Method):
    """Meta-steps on whole runs; validation tells how far runs end behind tuned AdamW.

    Args:
        recipe: how.
        data: where images are looked for.
        workers: processes that share the tasks of a meta-step.
        family: the tasks, if they have no registered name.
    """

    unit, keeps_best = "meta-step", False

    def __init__(
        self,
        recipe: EvolutionRecipe,
        data: DataOptions,
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
        self.recipe, self.data, self.workers, self.given = recipe, data, workers, family
        self.rounds, self.source = recipe.meta_steps, RunSource.of(recipe, data)
        self.family = None if self.source.is_mixture else family or self.source.family()
        self._map: jobs.Map = map
        self._folder = Path()

    def initialize(self, rule: UpdateRule) -> None:
        if not list(rule.parameters()):
            raise ValueError(f"rule {rule.name!r} has no weights to train")
        if rule.needs_loss:
            raise ValueError(
                f"rule {rule.name!r} reads the loss, which evolution strategies do not hand to it: "
                f"configure it without, or train it by a recipe of backpropagation"
            )
        rule.warmup_steps, rule.trained_steps = 0, self.source.longest_run

    def optimizer(self, rule: UpdateRule) -> MetaOptimizer:
        recipe = self.recipe
        return MetaOptimizer(
            rule, meta_lr=recipe.meta_lr, meta_lr_final=recipe.meta_lr_final, average=_AVERAGE,
            betas=_BETAS,
        )  # fmt: skip

    def load(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def session(self, folder: Path, report: Report) -> Iterator[None]:
        if self.source.is_mixture:
            load_images("mnist", True, self.data)  # now, not in a worker
        with jobs.worker_map(self.workers, self.given) as self._map:
            try:
                yield
            finally:
                self._map = map

    # ---- training

    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        recipe, weights = self.recipe, optimizer.weights
        first = 100_000 * (recipe.seed + 1) + (number - 1) * recipe.tasks_per_meta_step
        todo = [
            jobs.TaskJob(
                jobs.training_seed(first + i), weights, recipe, self.source,
                self._is_large(number, i),
            )
            for i in range(recipe.tasks_per_meta_step)
        ]  # fmt: skip
        results = list(self._map(jobs.run_task, todo))
        gradient, used = jobs.meta_gradient(results, recipe.pairs, len(weights))
        why = next((r.error for r in results if r.error), "no fitness was finite")
        if used:
            optimizer.step(gradient, (number - 1) / self.rounds)
        skipped = [result for result in results if result not in used]
        details = {
            "gradient_norm": gradient.norm().item(),
            "tasks": [result.metrics() for result in used],
            "skipped": [result.failure() for result in skipped],
        }
        values = [task["fitness"] for task in details["tasks"]]
        fitness = sum(values) / len(values) if values else math.inf
        why = f"none of its {len(results)} tasks gave a finite fitness ({why})"
        return Round(fitness, len(skipped), why, 2 * recipe.pairs * len(results), details)

    def _is_large(self, number: int, index: int) -> bool:
        """Whether the task with this index in a meta-step is a larger one."""
        large = self.recipe.large_share * self.recipe.tasks_per_meta_step
        return number > self.recipe.large_from and index < round(large)

    # ---- validation

    def validates_after(self, number: int) -> bool:
        return number % self.recipe.validation_every == 0 or number == self.rounds

    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Log of the final loss minus that of tuned AdamW on the same runs.

        Figures are the ``mean`` over tasks, each counting at most 1.5; the ``median``;
        ``mean_known`` and ``mean_unknown``, of runs whose length the rule is told or not; and
        ``share_ahead``, the share of tasks on which the rule ends below AdamW.
        """
        import numpy as np  # of an extra: see populations._rollout

        weights = parameters_to_vector(rule.parameters()).detach()[None]
        excess = []
        with given_family(self.given):
            against = self.references(report)
            todo = [
                jobs.ValidationJob(found.index, self.source, weights, self.recipe.rule)
                for found in against
            ]
            for reference, (score,) in zip(
                against, self._map(jobs.validate_task, todo), strict=True
            ):
                excess.append(score - best_score(reference))
                report(f"validation {len(excess)}/{len(against)}")
        found, known = np.array(excess), np.array([reference.known for reference in against])
        bounded = np.minimum(found, _LARGEST_EXCESS)
        figures = {
            "mean": float(bounded.mean()),
            "median": float(np.median(found)),
            "mean_known": float(bounded[known].mean()) if known.any() else None,
            "mean_unknown": float(bounded[~known].mean()) if not known.all() else None,
            "share_ahead": float((found < 0).mean()),
        }
        value = float(bounded.mean()) if np.isfinite(bounded).all() else math.inf
        ratio = math.exp(value) if math.isfinite(value) else None
        return Validation(value, ratio, {"behind_adamw": {"average": figures}})

    def references(self, report: Report) -> list[Reference]:
        """Tuned AdamW on the validation tasks; runs what is missing in the folder and keeps it.

        Raises:
            ValueError: ``references.json`` is damaged.
        """
        count = self.recipe.validation_tasks
        found = {reference.index: reference for reference in read_references(self._folder)}
        missing = [(index, self.source) for index in range(count) if index not in found]
        for reference in self._map(jobs.reference_task, missing):
            found[reference.index] = reference
            write_references(self._folder, [found[index] for index in sorted(found)])
            report(f"AdamW {len(found)}/{count}")
        return [found[index] for index in range(count)]

    # ---- what is said of it

    def trained_on(self) -> dict[str, Any]:
        task = self.recipe.task
        if self.family is None:
            data = f"mixture {task}; MNIST's meta half is all real data in it"
            return {"data": data, "trained_for": TRAINED_FOR[task]}
        read: str | dict[str, str] = f"task family {task!r}, meta-training split alone"
        if self.given is not None:
            read = provenance.conditions_of_given(task, self.given)
        return {
            "data": read,
            "data_sets": list(self.family.data_sets),
            "trained_for": f"runs of {self.source.horizons} steps of {task}",
        }

    def task_names(self) -> list[str]:
        return [] if self.family is None or self.given is not None else [self.recipe.task]

    def summary(self, record: dict[str, Any]) -> str:
        average = record["behind_adamw"]["average"]
        return (
            f"final loss on {self.recipe.validation_tasks} validation runs: "
            f"{math.exp(average['mean']):.2f} of tuned AdamW's (geometric mean), ahead on "
            f"{average['share_ahead']:.0%}"
        )
