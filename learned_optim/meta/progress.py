"""What a meta-training tells while it runs: metrics, pace, time left, TensorBoard events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from learned_optim._extras import how_to_install

#: Told ``(what, done, total)`` while runs are validated or tested, or tuned AdamW makes them.
Report: TypeAlias = Callable[[str, int, int], None]

#: Writes the values of a step, by name, as TensorBoard events; ``None`` is left out.
WriteEvents: TypeAlias = Callable[[int, Mapping[str, float | None]], None]

# Durations that the time left is estimated from: later epochs may be longer.
_RECENT = 10


class TrainingError(ValueError):
    """A meta-training that has come to nothing; the message says why and what may help."""


@dataclass(frozen=True)
class EpochMetrics:
    """One line of ``metrics.jsonl``.

    Attributes:
        epoch: 1-based.
        meta_loss: mean over the epoch's runs of the mean loss times the horizon.
        validation: mean summed loss over the validation runs with the weights that would be kept.
        best: smallest validation so far.
        dropped: unrolls of this epoch left out because something in them was not finite.
        meta_lr: meta-learning rate after the epoch.
        seconds: duration of the epoch with its validation.
        ratio_to_adamw: validation over that of tuned AdamW on the same runs; ``None`` if unknown.
        runs_per_second: optimizee runs trained per second, without validation.
        seconds_left: of the remaining epochs, if they take as long as the last ones.
    """

    epoch: int
    meta_loss: float
    validation: float
    best: float
    dropped: int
    meta_lr: float
    seconds: float
    ratio_to_adamw: float | None = None
    runs_per_second: float | None = None
    seconds_left: float | None = None


@dataclass
class Pace:
    """How fast optimizee runs are trained.

    Attributes:
        runs: how many were.
        seconds: the time that took.
    """

    runs: int = 0
    seconds: float = 0.0

    @contextmanager
    def counting(self, runs: int) -> Iterator[None]:
        """Count ``runs``, and the time spent inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.runs += runs

    @property
    def per_second(self) -> float | None:
        """Runs per second; ``None`` before the first."""
        return self.runs / self.seconds if self.seconds else None


def seconds_left(durations: Sequence[float], remaining: int) -> float:
    """Seconds that ``remaining`` epochs take, if each takes the mean of the last ten.

    Args:
        durations: seconds of the epochs before, one at least.
        remaining: epochs to come.
    """
    recent = durations[-_RECENT:]
    return remaining * sum(recent) / len(recent)


def pace_text(runs_per_second: float | None, ratio: float | None) -> str:
    """Pace and ratio to tuned AdamW, as progress shows them; empty where neither is known."""
    parts = []
    if ratio is not None:
        parts.append(f"{ratio:.2f} of tuned AdamW's")
    if runs_per_second is not None:
        parts.append(f"{runs_per_second:.3g} runs/s")
    return ", ".join(parts)


def time_text(seconds: float) -> str:
    """A duration, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def event_writer(folder: Path, wanted: bool) -> Iterator[WriteEvents]:
    """Writes TensorBoard events into ``folder/tensorboard``, or nothing unless ``wanted``.

    Raises:
        ImportError: TensorBoard's package is not installed.
    """
    if not wanted:
        yield lambda step, values: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"TensorBoard events need its package: {how_to_install('meta')}"
        ) from error
    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(step: int, values: Mapping[str, float | None]) -> None:
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            writer.flush()

        yield write
