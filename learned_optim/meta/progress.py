"""What a meta-training tells while it runs: metrics, pace, time left, TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from learned_optim._extras import how_to_install

#: Told what a training is doing, in a line, whenever there is progress.
Report: TypeAlias = Callable[[str], None]

#: Writes the values of a step, by name, as TensorBoard events; ``None`` is left out.
WriteEvents: TypeAlias = Callable[[int, Mapping[str, float | None]], None]

# Durations that the time left is estimated from: later epochs may be longer.
_RECENT = 10


class TrainingError(ValueError):
    """A meta-training that has come to nothing; the message says why and what may help."""


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
