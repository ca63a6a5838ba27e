"""Nanoseconds per element of in-place sigmoid and tanh on one thread, on blocks that stay in cache.

    python benchmarks/activations.py

Why the in-place path of the LSTM rule evaluates all its gates with one sigmoid (docs/design.md).
"""

import time

import torch

from benchmarks import no_options

ROWS, GATES = 4096, 80  # a block of coordinates, and the four gates of 20 units
REPEATS = 30


def nanoseconds(activation: str) -> float:
    """Best of ``REPEATS`` timings, per element."""
    source = torch.randn(ROWS, GATES)
    work = torch.empty_like(source)
    best = float("inf")
    for _ in range(REPEATS):
        work.copy_(source)
        started = time.perf_counter()
        getattr(work, activation)()
        best = min(best, time.perf_counter() - started)
    return 1e9 * best / work.numel()


if __name__ == "__main__":
    no_options.parse(__doc__)
    torch.set_num_threads(1)
    for name in ("sigmoid_", "tanh_"):
        print(f"{name:9} {nanoseconds(name):.2f} ns per element")
