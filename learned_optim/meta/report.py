"""An evaluation's files: the tables and the plots of :mod:`learned_optim.summary` in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learned_optim.checkpoint import write_text
from learned_optim.summary import (
    brief,
    curve_file,
    lr_text,
    markdown,
    plot,
    ratio_text,
    table,
    value_text,
)

__all__ = [
    "brief",
    "lr_text",
    "markdown",
    "plot",
    "ratio_text",
    "table",
    "value_text",
    "write_report",
]


def write_report(summary: dict[str, Any], folder: Path) -> list[Path]:
    """``table.md`` and one PNG per task and horizon in ``folder``; returns what was written."""
    written = [folder / "table.md"]
    write_text(written[0], markdown(summary))
    for task in summary["tasks"]:
        for horizon in summary["protocol"]["horizons"]:
            path = folder / curve_file(task, horizon)
            plot(summary, task, horizon, path)
            written.append(path)
    return written
