"""What a meta-training does in a round, and how it validates: the contract of its methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from learned_optim.meta.meta_optimizer import MetaOptimizer
from learned_optim.meta.progress import Report
from learned_optim.meta.tasks import TaskFamily
from learned_optim.rules import UpdateRule


@dataclass(frozen=True)
class Validation:
    """What validation runs say of the kept weights.

    Attributes:
        value: the lower the better; infinite if it is not finite.
        ratio_to_adamw: the same relative to tuned AdamW on these runs; ``None`` if unknown.
        figures: further ones, for the record.
    """

    value: float
    ratio_to_adamw: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What came of the training of a round.

    Attributes:
        meta_loss: mean over its runs; infinite if none was finite.
        dropped: unrolls or tasks left out because something in them was not finite.
        why: what was wrong with those.
        runs: optimizee runs trained.
        details: for the metrics.
    """

    meta_loss: float
    dropped: int = 0
    why: str = ""
    runs: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """Where meta-gradients come from, and how weights are validated.

    Attributes:
        family: the tasks; ``None`` if they are a mixture of populations.
        rounds: how many there are.
        rank: number of this process.
        world: how many processes there are.
        runs_per_round: units of progress in a round.
        runs_done: of the present round.
    """

    #: What a round is.
    unit: ClassVar[str]
    #: Whether each process draws something of its own.
    draws_by_rank: bool = False
    #: What a user should know before it begins.
    note: str = ""
    #: Whether the finished checkpoint has the weights of the best validation, or the last ones.
    keeps_best: ClassVar[bool]
    family: TaskFamily | None
    rounds: int
    rank: int = 0
    world: int = 1
    runs_per_round: int = 1
    runs_done: int = 0

    @abstractmethod
    def initialize(self, rule: UpdateRule) -> None:
        """Refuse a rule that the method cannot train; say how its weights are to be used."""

    @abstractmethod
    def optimizer(self, rule: UpdateRule) -> MetaOptimizer:
        """What follows the meta-gradients of the rule."""

    @abstractmethod
    def train_round(self, number: int, optimizer: MetaOptimizer, report: Report) -> Round:
        """Train for one round, with a number from 1."""

    @abstractmethod
    def validates_after(self, number: int) -> bool:
        """Whether the round is followed by a validation."""

    @abstractmethod
    def validate(self, rule: UpdateRule, report: Report) -> Validation:
        """Run the rule on the validation runs, always the same."""

    def test(self, rule: UpdateRule, report: Report) -> dict[str, Any]:
        """Figures of the finished weights for the record."""
        return {}

    @contextmanager
    def session(self, folder: Path, report: Report) -> Iterator[None]:
        """Inside, rounds and validations are run."""
        yield

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take what earlier processes have left in the run folder."""

    @abstractmethod
    def trained_on(self) -> dict[str, Any]:
        """What was read and for what runs, for the record."""

    @abstractmethod
    def task_names(self) -> list[str]:
        """Registered tasks that the run depends on."""

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """What came of the training, in a line."""

    def barrier(self) -> None:  # noqa: B027
        """Wait until every process is here."""
