"""The two methods of meta-training: their contract with the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from learned_optim.meta import provenance
from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import UpdateRule

#: Takes a line on the progress of a training.
Report: TypeAlias = Callable[[str], None]


class TrainingError(ValueError):
    """A meta-training that failed; the message says why and what may help."""


@dataclass(frozen=True)
class Validation:
    """Results of the validation runs.

    Attributes:
        value: the lower the better; infinite in the place of nan.
        ratio_to_adamw: the same relative to tuned AdamW on these runs; ``None`` if unknown.
        figures: further ones, for the record.
    """

    value: float
    ratio_to_adamw: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """Results of the training of a round.

    Attributes:
        meta_loss: mean over its runs; infinite if none was finite.
        dropped: unrolls or tasks left out because something in them was not finite.
        why: the cause of the drops.
        runs: optimizee runs trained.
        details: for the metrics.
    """

    meta_loss: float
    dropped: int = 0
    why: str = ""
    runs: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """Where meta-gradients come from, and how weights are validated."""

    unit: ClassVar[str]  # name of a round
    keeps_best: ClassVar[bool]  # the best validation is finished, not the last round
    task: str  # the recipe's name of the tasks
    given: TaskFamily | None  # the tasks, if they were handed over in Python
    family: TaskFamily | None  # the tasks; None if they are a mixture of populations
    registered: Sequence[str]  # names of the registered tasks that the run depends on
    longest_run: int  # inner steps of the longest runs
    average: float  # decay of the moving average of the weights
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's decays
    clip_norm: float | None = None  # largest norm of a meta-gradient
    rank: int = 0  # number of this process
    rounds: int  # of the whole training
    runs_per_round: int = 1  # units of progress in a round
    runs_done: int = 0  # units of progress done in the present round
    note: str = ""  # a remark for the user before training begins

    def check_rule(self, rule: UpdateRule) -> None:
        """Raise ``ValueError`` for a rule that the method cannot train."""
        if not list(rule.parameters()):
            raise ValueError(f"rule {rule.name!r} has no weights to train")

    @abstractmethod
    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        """Train for one round, with a number from 1."""

    def validates_after(self, number: int) -> bool:
        """Whether a validation follows the round."""
        return True

    @abstractmethod
    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Run the rule on the validation runs, always the same."""

    def test(self, rule: UpdateRule, report: Report) -> dict[str, Any]:
        """Figures of the finished weights for the record."""
        return {}

    @contextmanager
    def session(self, report: Report) -> Iterator[None]:
        """Rounds and their validations run inside."""
        yield

    def trained_on(self) -> dict[str, Any]:
        """For the record: the tasks and data sets read in training."""
        data: str | dict[str, str] = f"task family {self.task!r}, meta-training split alone"
        if self.given is not None:
            data = provenance.conditions_of_given(self.task, self.given)
        assert self.family is not None
        return {"data": data, "data_sets": list(self.family.data_sets)}

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """The results of the training, in a line."""

    def barrier(self) -> None:  # noqa: B027
        """Wait until every process is here."""
