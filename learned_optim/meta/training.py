"""Meta-training on a user's own tasks, in one call."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from learned_optim._discovery import did_you_mean
from learned_optim.checkpoint import CheckpointError, check_writable, read_checkpoint
from learned_optim.meta.data import DataOptions
from learned_optim.meta.ranks import process_group
from learned_optim.meta.recipes import Recipe, load_recipe, rule_config
from learned_optim.meta.recipes.quick import RECIPE as QUICK
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
from learned_optim.meta.trainer import EpochMetrics, MetaTrainer
from learned_optim.pretrained import load_rule
from learned_optim.rules import RuleConfig, UpdateRule, rule_for

AnyTask: TypeAlias = str | Task | TaskFamily
#: One task, several, or several by name.
Tasks: TypeAlias = AnyTask | Sequence[AnyTask] | Mapping[str, AnyTask]


@dataclass(frozen=True)
class MetaTrained:
    """What came of a meta-training.

    Attributes:
        path: the finished checkpoint, which :class:`~learned_optim.LearnedOptimizer`,
            :func:`~learned_optim.push_to_hub` and ``learned-optim evaluate`` take.
        rule: the trained update rule.
        record: how it was made, with its validation and test figures; the file holds it too.
        history: metrics of every epoch.
    """

    path: Path
    rule: UpdateRule
    record: dict[str, Any]
    history: list[EpochMetrics]


def meta_train(
    tasks: Tasks,
    recipe: Recipe | str | Path | None = None,
    *,
    folder: str | Path,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    test_tasks: Tasks | None = None,
    output: str | Path | None = None,
    data: DataOptions | None = None,
    tensorboard: bool = False,
    threads: int = 1,
    progress: bool = True,
    **changes: Any,
) -> MetaTrained:
    """Meta-train an update rule on tasks of one's own; called again, it goes on where it stopped.

    Example:
        >>> task = ModuleTask(MyNetwork, loader, nn.functional.cross_entropy)
        >>> trained = meta_train(task, folder="runs/mine")
        >>> optimizer = LearnedOptimizer(model.parameters(), trained.rule)

    The run folder is that of :class:`MetaTrainer`: a kill loses at most the current epoch, and a
    resumed run gives the same bits. It refuses to go on with another recipe, or with tasks that
    compute something else: parameters, batches, first losses and gradients are compared. Under
    ``torchrun``, ranks share the tasks of every meta-step.

    Args:
        tasks: a task, usually a :class:`ModuleTask`, a family of them, or the name of a registered
            one; or several, as a sequence or by names of one's own.
        recipe: how to train, except on what; or the name or file of one. If not given, that of
            ``quick``: about 30,000 inner steps, on a small network some minutes of one core.
        folder: the run folder, created if needed.
        weights: of several tasks, in which proportion they are drawn; equal if not given.
        test_tasks: like ``tasks``, for the test figures in the record: the same losses on other
            data, say. If not given, the evaluation split of registered tasks and fresh runs of all
            others.
        output: where the finished checkpoint goes; into the run folder if not given.
        data: where registered tasks find their image sets.
        tensorboard: also write TensorBoard events into the folder.
        threads: of torch while it trains: more change the last bits, and hardly the time, of small
            optimizees.
        progress: print a line per epoch, with the time left, on standard error.
        **changes: fields of :class:`Recipe`, other than its tasks, that differ from ``recipe``'s.
            ``rule`` may be a configuration or a name; with ``start`` alone, the rule is that of the
            checkpoint. A new ``meta_lr`` takes ``meta_lr_final`` along, and a rule that cannot be
            replayed its estimator, unless they are given as well.

    Returns:
        The checkpoint's path, the rule, its record, and the metrics of the epochs.

    Raises:
        ValueError: an unknown or unfit field; tasks that cannot be meta-trained on, without
            parameters or batches or with a loss that is no finite number, does not depend on the
            parameters or keeps state (:func:`~learned_optim.meta.checks.check_family`); or a folder
            of another run.
        TrainingError: nothing in an epoch was finite.
        OSError: a file cannot be written.
    """
    options = data or DataOptions()
    label, family = _family(tasks, weights, TaskOptions("meta", options))
    chosen = _recipe(label, recipe, changes)
    test_family = None
    if test_tasks is not None:
        shares = weights if _names(test_tasks) == _names(tasks) else None
        tested, test_family = _family(test_tasks, shares, TaskOptions("evaluation", options))
        chosen = replace(chosen, test_task=tested)
    elif family is not None:
        _, test_family = _family(tasks, weights, TaskOptions("evaluation", options))
    if output is not None:
        check_writable(Path(output))
    with _threads(threads), process_group():
        trainer = MetaTrainer(
            chosen, Path(folder), options, tensorboard, family=family, test_family=test_family
        )
        lines = _Lines(trainer) if progress and trainer.rank == 0 else None
        trainer.train(lines.on_run if lines else None)
        path = trainer.files.finished if output is None else Path(output)
        if trainer.rank == 0 and not _is_finished(trainer, path):
            trainer.finish(path)
        trainer.meet()  # no rank reads the file before it is there
    rule, record = read_checkpoint(path)
    if lines:
        lines.end(path, record)
    return MetaTrained(path, rule, record, trainer.history)


# ---- tasks


def _family(
    tasks: Tasks, weights: Sequence[float] | Mapping[str, float] | None, options: TaskOptions
) -> tuple[str, TaskFamily | None]:
    """The recipe's name for tasks, and their family: ``None`` for one registered task."""
    if isinstance(tasks, (str, Task, TaskFamily)):
        if weights is not None:
            raise ValueError(f"weights={weights!r} are for several tasks, and there is one")
        if isinstance(tasks, str):
            return tasks, None
        return f"{GIVEN}:{_name(tasks)}", as_family(tasks)
    members = dict(zip(_names(tasks), _members(tasks), strict=True))
    if not isinstance(weights, Mapping) and weights is not None:
        if len(weights) != len(members):
            raise ValueError(f"{len(members)} tasks need as many weights, got {len(weights)}")
        weights = dict(zip(members, weights, strict=True))
    families = {
        name: build_tasks(task, options) if isinstance(task, str) else as_family(task)
        for name, task in members.items()
    }
    return f"{GIVEN}:{'+'.join(members)}", TaskMixture(families, weights)


def _members(tasks: Tasks) -> list[AnyTask]:
    if isinstance(tasks, Mapping):
        return list(tasks.values())
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        return list(tasks)
    return [as_family(tasks) if not isinstance(tasks, str) else tasks]


def _names(tasks: Tasks) -> list[str]:
    """Names of tasks: those of a mapping, or what they are, numbered where that repeats."""
    if isinstance(tasks, Mapping):
        return list(tasks)
    names: list[str] = []
    for task in _members(tasks):
        name = _name(task)
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names


def _name(task: AnyTask) -> str:
    if isinstance(task, str):
        return task
    inner = getattr(task, "task", task)  # of the family with one member
    return type(inner.module if isinstance(inner, ModuleTask) else inner).__name__


# ---- the recipe


def _recipe(task: str, recipe: Recipe | str | Path | None, changes: dict[str, Any]) -> Recipe:
    base = load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe or QUICK
    if not isinstance(base, Recipe):
        raise ValueError(
            f"meta_train takes recipes of backpropagation through unrolls, and got "
            f"{type(base).__name__}, which trains on a mixture of its own: see EvolutionTrainer"
        )
    known = [f.name for f in fields(Recipe) if f.name not in ("task", "test_task")]
    for name in changes:
        if name not in known:
            near = did_you_mean(name, [*known, "test_tasks"]) or f". Fields: {', '.join(known)}"
            raise ValueError(f"unknown field {name!r} of a recipe{near}")
    changes = dict(changes)
    if "rule" not in changes and changes.get("start") is not None:
        changes["rule"] = load_rule(changes["start"]).config
    if "rule" in changes:
        changes["rule"] = _rule(changes["rule"])
        replayed = rule_for(changes["rule"]).rows != "none"
        if not replayed and base.estimator == "replay":
            changes.setdefault("estimator", "autograd")
            if changes["estimator"] == "autograd":
                changes.setdefault("coordinates", None)  # only a replay can sample
    if "meta_lr" in changes and base.meta_lr_final is not None:
        ratio = base.meta_lr_final / base.meta_lr
        changes.setdefault("meta_lr_final", ratio * changes["meta_lr"])
    return replace(base, task=task, test_task=None, **changes)


def _rule(rule: Any) -> RuleConfig:
    if isinstance(rule, str):
        return rule_config(rule)
    if not isinstance(rule, RuleConfig):
        raise ValueError(
            f"rule must be a configuration, such as LSTMConfig(), or the name of a rule, and is a "
            f"{type(rule).__name__}. Weights to begin with are start=, a checkpoint"
        )
    return rule


# ---- the run


def _is_finished(trainer: MetaTrainer, path: Path) -> bool:
    """Whether the checkpoint is there already, of this recipe and these epochs."""
    try:
        _, record = read_checkpoint(path)
    except (FileNotFoundError, CheckpointError):
        return False
    same = record.get("recipe") == trainer.recipe.to_json()
    return same and record.get("epochs_run") == trainer.epoch


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Lines:
    """A line per epoch on standard error."""

    def __init__(self, trainer: MetaTrainer) -> None:
        self.trainer, self.shown = trainer, trainer.epoch
        done, epochs = trainer.epoch, trainer.recipe.epochs
        steps = trainer.recipe.validation_horizon or trainer.recipe.horizon
        self._say(f"{'resuming' if done else 'starting'} in {trainer.folder}: {epochs} epochs")
        alone = None if trainer.family.stackable else trainer.family.alone_because
        if alone and trainer.recipe.tasks_per_meta_step > trainer.task_world:
            self._say(f"forward passes one optimizee after another: {alone}")
        if not done:
            self._say(f"untrained: validation {trainer.validate():.4g}, loss over {steps} steps")

    def on_run(self, epoch: int, run: int, meta_loss: float) -> None:
        self._say_new()

    def end(self, path: Path, record: dict[str, Any]) -> None:
        self._say_new()
        test = record["test"]
        tested = f"test {test['mean']:.4g} ± {test['std']:.4g} on {test['runs']} fresh runs"
        self._say(f"best epoch {record['epoch']}: validation {record['validation']:.4g}, {tested}")
        self._say(f"wrote {path}")

    def _say_new(self) -> None:
        history, epochs = self.trainer.history, self.trainer.recipe.epochs
        for line in history[self.shown :]:
            left = (epochs - line.epoch) * sum(m.seconds for m in history) / len(history)
            dropped = f", {line.dropped} unrolls dropped" if line.dropped else ""
            self._say(
                f"epoch {line.epoch}/{epochs}: meta-loss {line.meta_loss:.4g}, validation "
                f"{line.validation:.4g} (best {line.best:.4g}){dropped}, {line.seconds:.0f} s, "
                f"{left:.0f} s left"
            )
        self.shown = len(history)

    def _say(self, text: str) -> None:
        print(f"meta_train: {text}", file=sys.stderr, flush=True)
