"""The process group of a meta-training on several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


@contextmanager
def process_group() -> Iterator[None]:
    """Under ``torchrun``, a process group, unless the script has begun one."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    # Optimizers import this; were the group there already, default arguments in it would keep the
    # group, and its threads, past its end. A thread that lets go of a tensor while the interpreter
    # ends aborts the process.
    import torch.distributed.nn  # noqa: F401

    # Restarted ranks may share a store with those before them, whose addresses are still in it.
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    # Meta-gradients live on the CPU, whatever else there is.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
