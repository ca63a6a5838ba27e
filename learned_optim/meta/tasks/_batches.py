"""Sources of batches: data loaders, iterables and functions behind one call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from learned_optim.meta.seeding import every_generator_seeded

#: A data loader, any other iterable of batches that can be read more than once, or a function that
#: returns a batch, or yields batches, of a generator or of nothing.
Source: TypeAlias = Iterable[Any] | Callable[[Generator], Any] | Callable[[], Any]

_LOADER = "DataLoader(dataset, batch_size=64, shuffle=True)"


class BatchSource:
    """Batches for one optimizee at a time, which follow from its generator alone.

    Whatever draws from a global generator (shuffling, random augmentation) does so under a seed
    that the optimizee's generator gives at every batch. A list of batches is drawn from at random;
    any other iterable is read from its beginning by every optimizee, and again when it ends. Of a
    data loader the sampler, the data set and ``collate_fn`` are used, in this process: not its
    workers, whose start takes longer than the training of an optimizee.

    Args:
        source: see :data:`Source`.

    Raises:
        ValueError: ``source`` is none of these.
    """

    def __init__(self, source: Source) -> None:
        _check_kind(source)
        self._source: Any = source
        self._generators: list[Generator] = []
        self._iterator: Iterator[Any] | None = None
        self._yields = True  # batches come from an iterator
        self._takes_generator = False
        if isinstance(source, DataLoader):
            self._source, self._generators = _in_process(source), _generators(source)
        elif callable(source):
            self._yields = inspect.isgeneratorfunction(source)
            self._takes_generator = _takes_generator(source)

    def separate(self) -> BatchSource:
        """The same source, read from its beginning."""
        other = copy.copy(self)
        other.reset()
        return other

    def reset(self) -> None:
        """Read from the beginning."""
        self._iterator = None

    def draw(self, generator: Generator) -> Any:
        """The next batch, as the source gives it.

        Raises:
            ValueError: the source is empty.
        """
        if isinstance(self._source, Sequence):  # a list of batches
            if not len(self._source):
                raise ValueError("there are no batches: the list of them is empty")
            return self._source[int(torch.randint(len(self._source), (), generator=generator))]
        if self._takes_generator and not self._yields:
            return self._source(generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        with every_generator_seeded(seed, self._generators):
            return self._next(generator) if self._yields else self._call(generator)

    def _next(self, generator: Generator) -> Any:
        for _ in range(2):  # the second time from the beginning
            if self._iterator is None:
                self._iterator = iter(self._call(generator))
            for batch in self._iterator:
                return batch
            self._iterator = None
        raise ValueError(f"there are no batches: {self._why_empty()}")

    def _call(self, generator: Generator) -> Any:
        if not callable(self._source):
            return self._source
        return self._source(generator) if self._takes_generator else self._source()

    def _why_empty(self) -> str:
        loader = self._source.loader if isinstance(self._source, _TensorBatches) else self._source
        if not isinstance(loader, DataLoader):
            return f"the {type(loader).__name__} that gives them ends at once"
        if isinstance(loader.dataset, IterableDataset):
            return "the data set of the DataLoader ends at once"
        return (
            f"a DataLoader of {len(loader.dataset)} examples with "  # type: ignore[arg-type]
            f"batch_size={loader.batch_size} and drop_last={loader.drop_last} gives none"
        )


class _TensorBatches:
    """Batches of a loader of tensors, indexed at once instead of collated."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        dataset: Any = self.loader.dataset
        batches: Any = self.loader.batch_sampler
        for index in batches:
            yield tuple(tensor[index] for tensor in dataset.tensors)


def _in_process(loader: DataLoader[Any]) -> Iterable[Any]:
    """The loader's batches without worker processes."""
    single = copy.copy(loader)
    single.num_workers, single.timeout, single.pin_memory = 0, 0, False
    plain = type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate
    return _TensorBatches(single) if plain and loader.batch_sampler is not None else single


def _generators(loader: DataLoader[Any]) -> list[Generator]:
    """Generators of the loader and of its samplers, besides the global ones."""
    batches = loader.batch_sampler
    owners = (loader, loader.sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, Generator)}.values())


def _takes_generator(function: Callable[..., Any]) -> bool:
    """Whether a function has a positional parameter without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return True
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


def _check_kind(source: Any) -> None:
    parts = source if isinstance(source, (list, tuple)) else ()
    if isinstance(source, Tensor) or any(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"batches is data rather than a source of batches: give {_LOADER} with "
            f"dataset = TensorDataset(inputs, targets)"
        )
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise ValueError(f"batches is a data set of single examples: give {_LOADER}")
    if isinstance(source, Iterator):
        raise ValueError(
            f"batches is a {type(source).__name__}, which can be read once, and every optimizee "
            f"reads it from the beginning: give the function that makes it, or list(batches)"
        )
    if isinstance(source, (str, Mapping)) or not (
        callable(source) or isinstance(source, Iterable) or hasattr(source, "__getitem__")
    ):
        raise ValueError(
            f"batches must be a DataLoader, another iterable of batches, or a function that "
            f"returns one, and is a {type(source).__name__}"
        )


def flatten(batch: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """The tensors of a batch, and the keys that :func:`unflatten` needs.

    Args:
        batch: a tensor, a tuple or list of tensors, or a mapping to tensors.

    Returns:
        The tensors, and their keys in a mapping, ``()`` for a single tensor or ``None`` for a
        tuple.

    Raises:
        ValueError: something in it is no tensor.
    """
    if isinstance(batch, Tensor):
        return (batch,), ()
    if not isinstance(batch, (Mapping, tuple, list)) or not batch:
        raise ValueError(
            f"a batch must be a tensor, or a tuple or dict with tensors, "
            f"and is a {type(batch).__name__}"
        )
    parts = batch if isinstance(batch, Mapping) else dict(enumerate(batch))
    for key, part in parts.items():
        if not isinstance(part, Tensor):
            raise ValueError(
                f"a batch must consist of tensors, and its entry {key!r} is a "
                f"{type(part).__name__}: convert it, in collate_fn for example"
            )
    return tuple(parts.values()), tuple(parts) if parts is batch else None


def unflatten(batch: tuple[Tensor, ...], keys: tuple[Any, ...] | None) -> Any:
    """The inverse of :func:`flatten`."""
    if keys is None:
        return batch
    return dict(zip(keys, batch, strict=True)) if keys else batch[0]
