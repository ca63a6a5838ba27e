"""The field: tasks that people recognise, each for its stated number of steps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence

from learned_optim.meta.baselines import baseline, make_baseline
from learned_optim.meta.data import DataOptions
from learned_optim.meta.runs import MakeOptimizer, Run, learned_optimizer, train
from learned_optim.meta.tasks import Horizon, field_tasks

#: Learning rates over which baselines are tuned on the field.
FIELD_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: A run's losses are kept as means over this many equal stretches of its steps.
STRETCHES = 100
#: Share of the run whose mean loss is the final one.
FINAL_SHARE = 0.05


def horizon(task: str) -> Horizon:
    """For how many steps a task of the field is trained.

    Raises:
        ValueError: the task has no stated number of steps.
    """
    module, _, name = task.rpartition(":")
    table = getattr(importlib.import_module(module), "FIELD", {}) if module else field_tasks()
    if name not in table:
        known = ", ".join(sorted(table)) or "none"
        raise ValueError(
            f"the task {task!r} is not of the field: the FIELD table of its module states no "
            f"number of steps for it. Known: {known}"
        )
    found: Horizon = table[name]
    return found


def final_loss(run: Run) -> float:
    """Mean loss of a run's last 5 %; infinite if it diverged."""
    count = max(1, math.ceil(FINAL_SHARE * len(run.losses)))
    return sum(run.losses[-count:]) / count


def measure(
    optimizers: Mapping[str, MakeOptimizer | str],
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    quick: bool = True,
    data: DataOptions | None = None,
) -> dict[tuple[str, str, int], float]:
    """Final training losses of optimizers on the field, in this process, without a log.

    For trying things out; ``learned-optim evaluate --suite field`` is the protocol.

    Args:
        optimizers: by label, functions ``(parameters, total steps) -> optimizer``, or one of
            ``"baseline:NAME"``, ``"baseline:NAME@LR"`` and a checkpoint's name or file.
        tasks: names of the field; all of them if not given.
        seeds: test seeds.
        quick: take the quick tier's steps.
        data: where images and texts are.

    Returns:
        By task, label and seed; infinite for a run that diverged.
    """
    makers = {
        label: _maker(made) if isinstance(made, str) else made for label, made in optimizers.items()
    }
    found = {}
    for task in tasks or field_tasks():
        steps = horizon(task).quick if quick else horizon(task).steps
        for label, make in makers.items():
            for seed in seeds:
                run = train(task, make, "test", seed, steps, data or DataOptions())
                found[task, label, seed] = final_loss(run)
    return found


def _maker(text: str) -> MakeOptimizer:
    """An optimizer of :func:`measure` from its name."""
    if not text.startswith("baseline:"):
        return lambda params, total_steps: learned_optimizer(params, text, total_steps)
    name, _, given = text.removeprefix("baseline:").partition("@")
    lr = float(given) if given else baseline(name).lr
    if lr is None:
        raise ValueError(f"the baseline {name!r} has no learning rate of its own: say {name}@LR")
    return lambda params, total_steps: make_baseline(name, params, lr, total_steps)
