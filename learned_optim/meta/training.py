"""Meta-training on a user's own tasks, in one call."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from learned_optim.checkpoint import check_writable, read_checkpoint
from learned_optim.meta.data import DataOptions
from learned_optim.meta.recipes import (
    AnyRecipe,
    EvolutionRecipe,
    Recipe,
    check_names,
    load_recipe,
    rule_config,
)
from learned_optim.meta.recipes.quick import RECIPE as QUICK
from learned_optim.meta.seeding import torch_threads
from learned_optim.meta.tasks import (
    GIVEN,
    ModuleTask,
    Task,
    TaskFamily,
    TaskMixture,
    TaskOptions,
    as_family,
    build_tasks,
)
from learned_optim.meta.trainer import MetaTrainer, Metrics
from learned_optim.meta.unrolls import process_group
from learned_optim.pretrained import load_rule
from learned_optim.rules import RuleConfig, UpdateRule

AnyTask: TypeAlias = str | Task | TaskFamily
#: One task, several, or several by name.
Tasks: TypeAlias = AnyTask | Sequence[AnyTask] | Mapping[str, AnyTask]


@dataclass(frozen=True)
class MetaTrained:
    """The results of a meta-training.

    Attributes:
        path: the finished checkpoint, which :class:`~learned_optim.LearnedOptimizer`,
            :func:`~learned_optim.push_to_hub` and ``learned-optim evaluate`` take.
        rule: the trained update rule.
        record: how it was made, with its validation and test figures; the file holds it too.
        history: metrics of every epoch, or, with a recipe of evolution strategies, meta-step.
    """

    path: Path
    rule: UpdateRule
    record: dict[str, Any]
    history: list[Metrics]


def meta_train(
    tasks: Tasks,
    recipe: AnyRecipe | str | Path | None = None,
    *,
    folder: str | Path,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    test_tasks: Tasks | None = None,
    output: str | Path | None = None,
    data: DataOptions | None = None,
    against_adamw: bool = True,
    threads: int = 1,
    workers: int = 1,
    progress: bool = True,
    **changes: Any,
) -> MetaTrained:
    """Meta-train an update rule on your own tasks; a second call resumes.

    Example:
        >>> task = ModuleTask(MyNetwork, loader, nn.functional.cross_entropy)
        >>> trained = meta_train(task, folder="runs/mine")
        >>> optimizer = LearnedOptimizer(model.parameters(), trained.rule)

    The run folder is that of :class:`MetaTrainer`: a kill loses at most the current epoch, and a
    resumed run gives the same bits. It refuses to go on with another recipe, or with tasks that
    compute something else: parameters, batches, first losses and gradients are compared. Under
    ``torchrun``, ranks share the tasks of every meta-step.

    Recipes of evolution strategies (``"quick-evolution"``, ``"diagonal"``) compare whole runs under
    perturbed weights, in ``workers`` processes. The shipped default was trained by one.

    Args:
        tasks: a task (usually a :class:`ModuleTask`), a family of tasks, or the name of a
            registered one; or several, in a sequence or a dict with names.
        recipe: a recipe, or the name or file of one; ``tasks`` replace its own. ``quick`` if not
            given: about 30,000 inner steps, on a small network some minutes of one core. A recipe
            of evolution strategies needs a ``horizon`` if its own tasks are a mixture.
        folder: the run folder, created if needed.
        weights: proportions in which several tasks are drawn; equal if not given.
        test_tasks: like ``tasks``, for the test figures in the record, for example the same losses
            on other data. If not given, the evaluation split of registered tasks and fresh runs of
            all others. Recipes of evolution strategies take none: their validation selects
            nothing, so it is the test as well.
        output: where the finished checkpoint goes; into the run folder if not given.
        data: where registered tasks find their image sets.
        against_adamw: tune AdamW on the validation runs before training, and report validation as a
            ratio to it. It takes as long as eight validations without the rule. Recipes of
            evolution strategies always do.
        threads: of torch in training. Small optimizees are no faster with more, and differ in the
            last bits.
        workers: processes of a training by evolution strategies; a script that takes several needs
            ``if __name__ == "__main__":``.
        progress: show a progress bar and the results on standard error.
        **changes: fields of the recipe, other than its tasks, that differ from ``recipe``'s.
            ``rule`` may be a configuration or a name; with ``start`` alone, the rule is that of the
            checkpoint. A new ``meta_lr`` scales ``meta_lr_final``, unless that is given as well.

    Returns:
        The checkpoint's path, the rule, its record, and the metrics of the epochs.

    Raises:
        ValueError: an unknown or unfit field; tasks that cannot be meta-trained on
            (:func:`~learned_optim.meta.checks.check_family`); or a folder of another run.
        TrainingError: nothing in an epoch was finite.
        OSError: a file cannot be written.
    """
    options = data or DataOptions()
    label, family = _family(tasks, weights, TaskOptions("meta", options))
    chosen = _recipe(label, recipe, changes)
    if output is not None:
        check_writable(Path(output))
    test_family = None
    if test_tasks is not None:
        if isinstance(chosen, EvolutionRecipe):
            raise ValueError(
                "test_tasks do not apply to a recipe of evolution strategies, which selects "
                "nothing by its validation runs: evaluate on them instead"
            )
        shares = weights if list(_named(test_tasks)) == list(_named(tasks)) else None
        tested, test_family = _family(test_tasks, shares, TaskOptions("evaluation", options))
        chosen = replace(chosen, test_task=tested)
    elif family is not None and isinstance(chosen, Recipe):
        _, test_family = _family(tasks, weights, TaskOptions("evaluation", options))
    with torch_threads(threads), process_group():
        trainer = MetaTrainer(
            chosen, folder, options, workers=workers, family=family, test_family=test_family,
            against_adamw=against_adamw,
        )  # fmt: skip
        path = trainer.run(None if output is None else Path(output), progress)
        rule, record = read_checkpoint(path)
    if progress and trainer.method.rank == 0:
        print(f"{trainer.method.summary(record)}\nwrote {path}", file=sys.stderr)
    return MetaTrained(path, rule, record, trainer.history)


# ---- the recipe


def _recipe(task: str, recipe: AnyRecipe | str | Path | None, changes: dict[str, Any]) -> AnyRecipe:
    base = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe or QUICK
    known = [f.name for f in fields(base) if f.name not in ("task", "test_task")]
    check_names(changes, known, "a recipe")
    if "rule" not in changes and changes.get("start") is not None:
        changes["rule"] = load_rule(changes["start"]).config
    if "rule" in changes:
        changes["rule"] = _rule(changes["rule"])
    if "meta_lr" in changes and base.meta_lr_final is not None:
        ratio = base.meta_lr_final / base.meta_lr
        changes.setdefault("meta_lr_final", ratio * changes["meta_lr"])
    if isinstance(base, Recipe):
        changes["test_task"] = None
    return replace(base, task=task, **changes)


def _rule(rule: Any) -> RuleConfig:
    if isinstance(rule, str):
        return rule_config(rule)
    if not isinstance(rule, RuleConfig):
        raise ValueError(
            f"rule must be a configuration, such as LSTMConfig(), or the name of a rule, and is a "
            f"{type(rule).__name__}. Weights to begin with are start=, a checkpoint"
        )
    return rule


# ---- the tasks


def _family(
    tasks: Tasks, weights: Sequence[float] | Mapping[str, float] | None, options: TaskOptions
) -> tuple[str, TaskFamily | None]:
    """The recipe's name of the tasks, and their family unless they are one registered name."""
    named = _named(tasks)
    if isinstance(tasks, (str, Task, TaskFamily)):
        if weights is not None:
            raise ValueError(f"weights={weights!r} are for several tasks, and there is one")
        if isinstance(tasks, str):
            return tasks, None
        return f"{GIVEN}:{next(iter(named))}", as_family(tasks)
    if weights is not None and not isinstance(weights, Mapping):
        if len(weights) != len(named):
            raise ValueError(f"{len(named)} tasks need as many weights, got {len(weights)}")
        weights = dict(zip(named, weights, strict=True))
    families = {
        name: build_tasks(task, options) if isinstance(task, str) else as_family(task)
        for name, task in named.items()
    }
    return f"{GIVEN}:{'+'.join(named)}", TaskMixture(families, weights)


def _named(tasks: Tasks) -> dict[str, AnyTask]:
    """Tasks by their names in a mapping, or by class, with numbers against repetition."""
    if isinstance(tasks, Mapping):
        return dict(tasks)
    several = isinstance(tasks, Sequence) and not isinstance(tasks, str)
    listed: Sequence[AnyTask] = tasks if several else [tasks]  # type: ignore[assignment, list-item]
    named: dict[str, AnyTask] = {}
    for task in listed:
        name = _name(task)
        same = sum(other == name or other.startswith(f"{name}-") for other in named)
        named[f"{name}-{same + 1}" if same else name] = task
    return named


def _name(task: AnyTask) -> str:
    if isinstance(task, str):
        return task
    inner = getattr(task, "task", task)  # of the family with one member
    return type(inner.module if isinstance(inner, ModuleTask) else inner).__name__
