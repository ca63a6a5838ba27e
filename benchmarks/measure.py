"""How things are timed and weighed: in turns within one process, or alone in a fresh one.

python -m benchmarks.measure MODULE:FUNCTION ARGUMENT ...    # what in_child runs
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def in_turns(
    subjects: dict[str, Callable[[], object]], rounds: int, threads: int = 1
) -> dict[str, float]:
    """Seconds of each subject, the best of ``rounds`` in which all of them take their turn.

    On one thread it is that thread's processor time, so that a busy machine costs cache misses
    alone; on more it is wall-clock time.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    best = dict.fromkeys(subjects, float("inf"))
    for count in range(rounds + 1):  # the first is a warm-up
        for name, run in subjects.items():
            started = clock()
            run()
            if count:
                best[name] = min(best[name], clock() - started)
    torch.set_num_threads(1)
    return best


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the process grows at most while ``run`` runs (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already is not to be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def available_memory() -> int:
    """Bytes that the machine could still give."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_child(function: str, *arguments: Any) -> Any:
    """What ``module:function`` returns in a fresh process; everything travels as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", function, *map(json.dumps, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else "unknown",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__.split("+")[0],
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*map(json.loads, sys.argv[2:]))
    print(json.dumps(result))
