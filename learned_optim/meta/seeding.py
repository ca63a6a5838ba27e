"""Generators whose seeds are stable hashes of their purpose."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator


def seeded(*parts: object) -> Generator:
    """A CPU generator whose seed is a hash of ``parts``, the same in every process."""
    return Generator().manual_seed(_seed_of(*parts))


@contextmanager
def global_generator_seeded(*parts: object) -> Iterator[None]:
    """Seed torch's global generator by a hash of ``parts`` inside the context.

    Dropout and the like draw from the global generator; everything else has its own generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(*parts))
        yield


@contextmanager
def every_generator_seeded(seed: int, more: Iterable[Generator] = ()) -> Iterator[None]:
    """Seed the generators that users' code draws from, and restore them afterwards.

    These are the global generators of torch (on the CPU), of Python's ``random`` and, if it is
    imported, of numpy.

    Args:
        seed: non-negative.
        more: further generators of torch, such as that of a data loader.
    """
    generators = [torch.default_generator, *more]
    numpy = sys.modules.get("numpy")
    states = [generator.get_state() for generator in generators]
    python = random.getstate()
    legacy = numpy.random.get_state() if numpy is not None else None
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


def _seed_of(*parts: object) -> int:
    """A hash of ``parts`` below 2**56."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's threads inside the context: sums depend on how threads split them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
