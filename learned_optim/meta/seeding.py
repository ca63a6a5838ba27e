"""Generators whose seeds are stable hashes of what they are for."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator


def seeded(*parts: object) -> Generator:
    """A CPU generator seeded by a hash of ``parts``: the same in every process and version."""
    return Generator().manual_seed(seed_of(*parts))


@contextmanager
def global_generator_seeded(*parts: object) -> Iterator[None]:
    """Seed torch's global generator by a hash of ``parts`` inside, and put it back afterwards.

    Dropout and the like draw from the global generator; everything else has one of its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(*parts))
        yield


def seed_of(*parts: object) -> int:
    """The seed below 2**56 that ``parts`` hash to."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
