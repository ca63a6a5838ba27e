"""Whether an evaluation would draw on images that meta-trained what it evaluates."""

from __future__ import annotations

from collections.abc import Sequence

from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks import TaskOptions, build_tasks
from learned_optim.pretrained import load_record


def check_blind(checkpoints: Sequence[str], tasks: Sequence[str], data: DataOptions) -> None:
    """Hold the data that checkpoints were trained on, by their records, against that of tasks.

    Raises:
        ValueError: a task draws on all images of a set that meta-trained a checkpoint with a half
            of them; the message names a task that keeps to the other half.
    """
    families = {name: build_tasks(name, TaskOptions("evaluation", data)) for name in tasks}
    for checkpoint in checkpoints:
        trained_on = set(load_record(checkpoint).get("data_sets", ()))
        for name, family in families.items():
            shared = sorted(trained_on & set(family.data_sets))
            if shared and not family.halved:
                raise ValueError(
                    f"{checkpoint!r} was meta-trained on half of the {', '.join(shared)} images, "
                    f"and the task {name!r} draws on all of them: leave it out, or "
                    f"evaluate on '{shared[0]}-half', whose images it has not seen"
                )
