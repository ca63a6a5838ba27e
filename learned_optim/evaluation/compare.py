"""The learned optimizer beside AdamW on a task of one's own, in one call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.evaluation import runs
from learned_optim.evaluation.figures import final_loss
from learned_optim.evaluation.runs import Run, RunLog, RunSpec
from learned_optim.evaluation.statistics import curve
from learned_optim.meta import provenance
from learned_optim.meta.data import DataOptions
from learned_optim.meta.tasks import FixedTask, ModuleTask, Params
from learned_optim.summary import draw_curves, table

RIVAL = "adamw-cosine"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``str()`` is its table.

    Attributes:
        name: of the task.
        learned: the learned optimizer's run.
        rivals: AdamW's runs by learning rate.
    """

    name: str
    learned: Run
    rivals: dict[float, Run]

    def by_label(self) -> dict[str, Run]:
        """All runs by what tables and legends call them."""
        return {
            "learned optimizer (learned)": self.learned,
            **{f"AdamW, lr {lr:g}": run for lr, run in self.rivals.items()},
        }

    def __str__(self) -> str:
        found = self.by_label()
        tests = list(dict.fromkeys(name for run in found.values() for name in run.test))
        rows = [
            [
                label.removesuffix(" (learned)"),
                "diverged" if math.isinf(loss := final_loss(run)) else f"{loss:.4g}",
                *(f"{run.test[test]:.4g}" if test in run.test else "" for test in tests),
                "" if math.isinf(run.seconds) else f"{run.seconds:.1f}",
            ]
            for label, run in found.items()
        ]
        head = [self.name, "final training loss", *tests, "seconds"]
        return table(head, rows)


class _OwnTask(ModuleTask):
    """A user's task with held-out figures of the user's."""

    figures: Callable[[nn.Module], dict[str, float]]

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        self.module.load_state_dict({**params, **self.buffers()}, strict=False)
        self.module.eval()
        try:
            return {name: float(x) for name, x in self.figures(self.module).items()}
        finally:
            self.module.train()


def compare(
    make_model: Callable[[], nn.Module],
    make_batches: Callable[[], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int,
    *,
    test: Callable[[nn.Module], dict[str, float]] | None = None,
    name: str = "task",
    checkpoint: str = "default",
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3),
    seed: int = 0,
    output: Path | str = "comparison",
) -> Comparison:
    """Train a model with the learned optimizer, and with AdamW at several learning rates.

    All runs start from the same weights and see the same batches. AdamW has a warm-up over 5 % of
    the steps and a cosine to zero. The table is printed; learning curves go to ``NAME.png`` in
    ``output``. Finished runs are kept there: the same call does only those that are missing.

    Args:
        make_model: makes the untrained model; called under a seed.
        make_batches: makes what batches come from: a data loader, another iterable of batches, a
            list of batches to draw from, or a function of a generator that returns one.
        loss: ``(model, batch) -> loss`` of shape ``()``.
        steps: optimizer steps of every run.
        test: ``model -> held-out figures by name``, for the table.
        name: what the table and files call the task.
        checkpoint: the learned optimizer.
        lrs: AdamW's learning rates.
        seed: of weights and batches.
        output: folder of the runs and the plot.

    Raises:
        ValueError: unknown checkpoint, no steps or learning rates, or the runs in ``output`` are of
            another task of this name.
    """
    if steps < 1 or not lrs:
        raise ValueError(f"compare needs steps and learning rates, got {steps} and {list(lrs)}")
    folder = Path(output)
    task = _OwnTask(make_model, make_batches(), loss=loss)
    task.figures = test or (lambda model: {})
    family = FixedTask(task, stackable=False)
    conditions = provenance.conditions([], DataOptions())
    conditions |= provenance.conditions_of_given(name, family)
    conditions = provenance.check(folder, conditions, "give another output or name")
    provenance.remember(folder, conditions)
    learned, adamw = runs.optimizer_specs([checkpoint], [RIVAL])
    specs = {lr: RunSpec(name, adamw, lr, "test", seed, steps) for lr in lrs}
    own = RunSpec(name, learned, 1.0, "test", seed, steps)
    log = RunLog(folder / "runs.jsonl")
    perform = partial(runs.run, data=DataOptions(), families={name: family})
    runs.run_missing(
        log, [own, *specs.values()], perform,
        lambda done, total, what: print(f"{name}: {done} of {total} {what}", file=sys.stderr),
    )  # fmt: skip
    rivals = {lr: log.runs[spec.key] for lr, spec in specs.items()}
    found = Comparison(name, log.runs[own.key], rivals)
    curves = {
        label: curve(torch.tensor([run.losses], dtype=torch.float64), steps)
        for label, run in found.by_label().items()
    }
    draw_curves(curves, folder / f"{name}.png", f"{name}, {steps:,} steps")
    print(f"{found}\n")
    return found
