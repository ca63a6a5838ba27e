"""What the benchmarks share: timing, parameters, and the files of figures."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learned_optim import list_pretrained
from learned_optim.pretrained import ALIASES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PERFORMANCE = DOCS / "performance"
RESULTS = DOCS / "results"


def shipped() -> list[str]:
    """Returns the names of the shipped checkpoints, without aliases; the default comes first."""
    default = ALIASES["default"]
    return [default, *(n for n in list_pretrained() if n not in {*ALIASES, default})]


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """Returns seeded parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn(param.shape, generator=generator)
    return params


def best_seconds(
    subjects: dict[str, Callable[[], object]], rounds: int, threads: int = 1
) -> dict[str, float]:
    """Times functions in turns and returns the smallest time of each over ``rounds``.

    One thread is timed by its processor time, so that other processes cost cache misses alone.
    Several threads are timed by the clock.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    best = dict.fromkeys(subjects, float("inf"))
    for count in range(rounds + 1):  # the first round is a warm-up
        for name, run in subjects.items():
            started = clock()
            run()
            if count:
                best[name] = min(best[name], clock() - started)
    torch.set_num_threads(1)
    return best


def machine() -> dict[str, Any]:
    """Returns what a time depends on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__.split("+")[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Writes figures as JSON, one line per entry of the outer object; returns them as read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in figures.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path.write_text(text)
    return json.loads(text)


def load(path: Path) -> dict[str, Any]:
    """Returns saved figures."""
    return json.loads(path.read_text())
