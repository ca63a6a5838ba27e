"""Lengths of runs and unrolls as data: a number, a log-uniform range, a curriculum, a composition.

A recipe holds a schedule as a number of steps or as a table whose ``kind`` says which one it is;
the command line takes ``200``, ``log-uniform:100:2000`` and ``growing:50:400:10``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Generator, rand, randperm

from learned_optim._discovery import did_you_mean
from learned_optim._fields import check_fields

if TYPE_CHECKING:
    from learned_optim.meta.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Growing:
    """A curriculum (Chen et al. 2020): longer from epoch to epoch, by a constant factor."""

    first: int
    """Steps in the first epoch."""
    last: int
    """Steps from epoch ``epochs`` on."""
    epochs: int
    """How many epochs the growth takes."""
    kind: Literal["growing"] = "growing"
    """Which schedule this is."""

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.first, self.last, self.epochs) < 1:
            raise ValueError(
                f"a growing schedule needs first, last and epochs of at least 1, got {self.first}, "
                f"{self.last} and {self.epochs}"
            )

    def steps(self, epoch: int, u: float) -> int:
        """Steps in ``epoch``, counted from 1; nothing about them is random."""
        share = min(1.0, (epoch - 1) / max(1, self.epochs - 1))
        return round(self.first * (self.last / self.first) ** share)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Random lengths whose logarithm is uniform; either bound may grow."""

    low: int | Growing
    """Fewest steps."""
    high: int | Growing
    """Most steps."""
    kind: Literal["log-uniform"] = "log-uniform"
    """Which schedule this is."""

    def __post_init__(self) -> None:
        check_fields(self)
        for epoch in range(1, self._grown() + 1):
            low, high = steps_of(self.low, epoch, 0.0), steps_of(self.high, epoch, 0.0)
            if not 1 <= low <= high:
                raise ValueError(
                    f"a log-uniform schedule needs 1 <= low <= high, got low={low} and "
                    f"high={high} in epoch {epoch}"
                )

    def _grown(self) -> int:
        """The first epoch in which both bounds have grown."""
        bounds = (self.low, self.high)
        return max([b.epochs for b in bounds if isinstance(b, Growing)], default=1)

    def steps(self, epoch: int, u: float) -> int:
        """Steps of a run of ``epoch``, counted from 1, for a uniform ``u`` in [0, 1)."""
        low, high = steps_of(self.low, epoch, u), steps_of(self.high, epoch, u)
        return round(low * (high / low) ** u)


Schedule: TypeAlias = int | Growing | LogUniform

_KINDS: dict[str, type[Growing] | type[LogUniform]] = {
    "growing": Growing,
    "log-uniform": LogUniform,
}


def steps_of(schedule: Schedule, epoch: int, u: float) -> int:
    """What a schedule says for an epoch, counted from 1, and a uniform random number."""
    return schedule if isinstance(schedule, int) else schedule.steps(epoch, u)


def schedule_from_json(data: Any) -> Any:
    """A schedule from a recipe file; what is no table is returned as it is.

    Raises:
        ValueError: a table of no known ``kind``, or with other fields than that kind has.
    """
    if not isinstance(data, dict):
        return data
    kind = data.get("kind")
    if kind not in _KINDS:
        near = did_you_mean(str(kind), _KINDS)
        raise ValueError(f"unknown kind of schedule {kind!r}; known: {', '.join(_KINDS)}{near}")
    cls = _KINDS[kind]
    names = [field.name for field in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            raise ValueError(
                f"a {kind} schedule has no field {name!r}, but {', '.join(names)}"
                f"{did_you_mean(name, names)}"
            )
    try:
        return cls(**{name: schedule_from_json(value) for name, value in data.items()})
    except TypeError as error:
        raise ValueError(f"a {kind} schedule needs {', '.join(names[:-1])}") from error


def parse_schedule(text: str) -> Schedule:
    """A schedule as it is written on the command line.

    Raises:
        ValueError: the text is none.
    """
    kind, *numbers = text.split(":")
    try:
        values = [int(number) for number in numbers]
        if not numbers:
            return int(kind)
    except ValueError as error:
        raise ValueError(f"{text!r} is no schedule: {_FORMS}") from error
    if kind == "growing" and len(values) == 3:
        return Growing(*values)  # type: ignore[arg-type]
    if kind == "log-uniform" and len(values) == 2:
        return LogUniform(*values)  # type: ignore[arg-type]
    raise ValueError(f"{text!r} is no schedule: {_FORMS}{did_you_mean(kind, _KINDS)}")


def schedule_text(schedule: Schedule | None) -> str:
    """How a schedule is said in a sentence, such as ``100`` or ``50 to 200``."""
    if isinstance(schedule, LogUniform):
        low, high = schedule_text(schedule.low), schedule_text(schedule.high)
        return f"{low.partition(' ')[0]} to {high.rpartition(' ')[2]}"
    if isinstance(schedule, Growing):
        return f"{schedule.first} to {schedule.last}"
    return str(schedule)


#: Metadata of a dataclass's field that holds a schedule: how the command line reads it.
SCHEDULE = {"parse": parse_schedule, "metavar": "SCHEDULE"}


_FORMS = "give a number of steps, log-uniform:LOW:HIGH or growing:FIRST:LAST:EPOCHS"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one optimizee run is cut into unrolls.

    Attributes:
        unrolls: for each, its inner steps and whether it ends in a meta-step.
        length: inner steps of the whole run, also of what follows the last meta-step and is left
            out of ``unrolls``, because it would teach nothing.
    """

    unrolls: list[tuple[int, bool]]
    length: int

    @classmethod
    def draw(cls, recipe: Recipe, epoch: int, generator: Generator) -> Plan:
        """The plan of a run.

        Args:
            recipe: says how long runs and unrolls are.
            epoch: counted from 1.
            generator: decides on what is random.
        """
        length, truncation = recipe.horizon, recipe.truncation
        tail, u = rand(2, generator=generator).tolist()
        if recipe.long_horizon is not None and tail < recipe.long_fraction:
            length = round(length * (recipe.long_horizon / length) ** u)
            truncation = recipe.long_truncation or truncation
        if recipe.horizons is not None:
            length = steps_of(recipe.horizons, epoch, u)
        if recipe.truncations is not None:
            truncation = steps_of(recipe.truncations, epoch, tail)
        whole, rest = divmod(length, truncation)
        steps = [truncation] * whole + [rest] * (rest > 0)
        # Those that end before the meta-loss begins have nothing to learn from.
        skipped = int(recipe.loss_from * length) // truncation
        count = len(steps) - skipped
        drawn = randperm(count, generator=generator)[: recipe.unrolls_per_run or count]
        chosen = {skipped + index for index in drawn.tolist()}
        return cls([(n, i in chosen) for i, n in enumerate(steps[: max(chosen) + 1])], length)
