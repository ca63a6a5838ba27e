"""Batches of every kind of source follow from an optimizee's generator alone."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from test_meta_train import DATA, INPUTS, TARGETS, loader, of_a_generator, regression
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from learned_optim.meta import ModuleTask
from learned_optim.meta.seeding import seeded


class Augmented(Dataset[Any]):
    """Noise from each of the global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + numpy.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return INPUTS[index] + noise, TARGETS[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(40):
            x = torch.randn(4)
            yield x, x[:1]


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        x = torch.randn(8, 4)
        yield x, x[:, :1]


def of_nothing() -> tuple[Tensor, Tensor]:
    index = torch.randint(96, (8,))
    return INPUTS[index], TARGETS[index]


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": loader,
    "the last batch is smaller": lambda: loader(batch_size=36),
    "a generator of the loader's": lambda: loader(generator=torch.Generator()),
    "drawn with replacement": lambda: loader(
        shuffle=None,
        sampler=RandomSampler(DATA, replacement=True, generator=torch.Generator()),
    ),
    "weighted": lambda: loader(shuffle=None, sampler=WeightedRandomSampler([1.0] * 96, 96)),
    "workers": lambda: loader(num_workers=2, persistent_workers=True, timeout=600),
    "augmented": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), batch_size=8),
    "a list": lambda: [(INPUTS[i : i + 8], TARGETS[i : i + 8]) for i in range(0, 96, 8)],
    "a function of a generator": lambda: of_a_generator,
    "a function of nothing": lambda: of_nothing,
    "a function that yields": lambda: endless,
}


def drawn(task: ModuleTask, run: int, count: int = 7) -> list[Tensor]:
    generator = seeded("batches", run)
    task.init(generator)
    return [torch.cat(task.batch(generator), 1) for _ in range(count)]


@pytest.mark.parametrize("name", SOURCES)
def test_batches_follow_from_the_generator_alone(name: str) -> None:
    task, again = regression(batches=SOURCES[name]()), regression(batches=SOURCES[name]())
    states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = drawn(task, 0)
    assert random.getstate() == states[0]
    assert (numpy.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.seed()
    random.seed()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(drawn(task, 1)[0], first[0])
    assert all(map(torch.equal, first, drawn(again, 0)))
    # Side by side, each optimizee reads from the beginning and does not move the other along.
    tasks, generators = [task.separate(), task.separate()], [seeded("batches", 0) for _ in range(2)]
    for one, generator in zip(tasks, generators, strict=True):
        one.init(generator)
    for step in range(7):
        for one, generator in zip(tasks, generators, strict=True):
            assert torch.equal(torch.cat(one.batch(generator), 1), first[step])


def test_an_epoch_of_a_loader_shows_every_example_once() -> None:
    batches = drawn(regression(batches=loader(batch_size=40)), 0, 6)
    assert [len(batch) for batch in batches] == [40, 40, 16] * 2
    for epoch in (batches[:3], batches[3:]):
        shown = torch.cat(epoch)[:, 0].sort().values
        assert torch.equal(shown, INPUTS[:, 0].sort().values)
    assert not torch.equal(batches[0], batches[3])


UNREADABLE = [
    ((INPUTS, TARGETS), "data rather than a source of batches: give DataLoader"),
    (INPUTS, "data rather than a source of batches"),
    (DATA, "a data set of single examples: give DataLoader"),
    (endless(), "a generator, which can be read once, .* give the function that makes it"),
    ({"x": INPUTS}, "must be a DataLoader, .* and is a dict"),
    (3, "must be a DataLoader, .* and is a int"),
]


@pytest.mark.parametrize(("batches", "message"), UNREADABLE, ids=[m for _, m in UNREADABLE])
def test_what_is_no_source_of_batches(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regression(batches=batches)
