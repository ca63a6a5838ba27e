"""Tasks: initial parameters, a source of batches and a loss, as pure functions."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import every_generator_seeded, global_generator_seeded, seeded
from learned_optim.meta.tasks._batches import BatchSource, Source, flatten, unflatten

#: Examples per forward pass on a held-out set: convolutions of a whole set would fill gigabytes.
TEST_SLICE = 1000

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]


class Task(ABC):
    """One thing to optimize. All randomness comes from the generators passed in.

    A task may keep state of the optimizee that it serves if :meth:`init` resets it: buffers, which
    :meth:`loss` updates, and a position in its data. Optimizees side by side then each have a task
    of their own, by :meth:`separate`.
    """

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Fresh initial parameters by name."""

    @abstractmethod
    def batch(self, generator: Generator) -> Batch:
        """The next batch: a tuple of tensors of the same shapes every time."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Loss of shape ``()``; differentiable in ``params``, pure, and fit for ``vmap``."""

    def test(self, params: Params) -> dict[str, float]:
        """Held-out figures, such as ``{"accuracy": 0.91}``; empty where there is no such set."""
        return {}

    def separate(self) -> Task:
        """The same task for another optimizee; itself if it keeps no state."""
        return self

    def buffers(self) -> Params:
        """What :meth:`loss` updates besides the parameters, such as running statistics."""
        return {}

    def load_buffers(self, buffers: Params) -> None:
        """Replace the buffers by others of the same names."""
        if buffers:
            raise NotImplementedError(f"{type(self).__name__} has buffers and cannot load them")


class TaskFamily(ABC):
    """A distribution of tasks.

    All tasks of a ``stackable`` family share parameter shapes, batch shapes and the loss function,
    so that several can be trained side by side under ``vmap``. They differ in their batches.
    """

    stackable: bool = True
    #: Why not, of a family that is not stackable.
    alone_because: str = "its tasks differ in structure"
    #: Image sets that its tasks read, for the record of a checkpoint that was trained on them.
    data_sets: tuple[str, ...] = ()
    #: Whether evaluation keeps to the half of these images that never meta-trains.
    halved: bool = True

    @abstractmethod
    def sample(self, generator: Generator) -> Task:
        """Draw a task."""


@dataclass(frozen=True)
class TaskOptions:
    """How a task family is built from its registered name."""

    split: Literal["meta", "evaluation"] = "evaluation"
    """Which images: the half that meta-trains, or the half (or whole set) that evaluates."""
    data: DataOptions = field(default_factory=DataOptions)


class ModuleTask(Task):
    """Any ``nn.Module`` with a loss and a source of batches.

    Example:
        >>> task = ModuleTask(
        ...     build=lambda: nn.Linear(3, 1),
        ...     batches=lambda g: (torch.randn(8, 3, generator=g), torch.ones(8, 1)),
        ...     criterion=nn.functional.mse_loss,
        ... )

    Args:
        build: makes the module, a class for example; called under seeded global generators, so
            that every optimizee starts from fresh weights, which follow from its seed. A module
            instead of a function: every optimizee starts from its weights, as in fine-tuning.
        batches: a data loader, another iterable of batches, or a function that returns a batch:
            of a generator, or of nothing, and then it may draw from the global generators. A batch
            is a tuple (or dict) of tensors; a function of a generator is the fastest.
        criterion: ``(outputs, targets) -> loss`` of shape ``()``, for batches of ``(inputs,
            targets)``.
        loss: ``(module, batch) -> loss`` of shape ``()``, for any other; instead of ``criterion``.
        init_std: weights ~ N(0, init_std^2) and biases 0 (one-dimensional parameters), as in the
            thesis; ``None`` keeps the module's own initialization.
        tests: held-out ``(inputs, targets)``, or ``None``. Their loss is reported and, where the
            targets are classes, the accuracy.

    Buffers (running statistics of batch norm) belong to the optimizee: :meth:`init` resets them and
    :meth:`loss` updates them. Parameters with ``requires_grad=False`` stay as ``build`` made them
    the first time, under a fixed seed.

    Raises:
        ValueError: ``build`` gives no module, or one whose parameters have no shape yet, or
            ``batches`` is no source of batches.
    """

    def __init__(
        self,
        build: nn.Module | Callable[[], nn.Module],
        batches: Source,
        criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        *,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        init_std: float | None = None,
        tests: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._build = partial(copy.deepcopy, build) if isinstance(build, nn.Module) else build
        self._source = BatchSource(batches)
        self._keys: tuple[Any, ...] | None = None  # how the source names the parts of a batch
        self._criterion = criterion if loss is None else None
        self._init_std = init_std
        self._tests = tests
        with global_generator_seeded("module"):  # frozen parameters: the same in every process
            self.module = self._build()
        _check_module(self.module)
        self._objective = _Objective(self.module, loss or _Supervised(criterion))
        self._first_buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        self._buffers = {name: b.clone() for name, b in self._first_buffers.items()}

    def init(self, generator: Generator) -> Params:
        self._buffers = {name: b.clone() for name, b in self._first_buffers.items()}
        self._source.reset()
        if self._init_std is None:
            with every_generator_seeded(int(torch.randint(2**62, (), generator=generator))):
                fresh = self._build()
            return {name: p.detach().clone() for name, p in _trainable(fresh)}
        return {
            name: self._init_std * torch.randn(p.shape, generator=generator)
            if p.dim() > 1
            else torch.zeros_like(p)
            for name, p in _trainable(self.module)
        }

    def batch(self, generator: Generator) -> Batch:
        batch, self._keys = flatten(self._source.draw(generator))
        return batch

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self._loss(params, unflatten(batch, self._keys))

    def _loss(self, params: Params, batch: Any) -> Tensor:
        given = {f"module.{name}": p for name, p in (*params.items(), *self._buffers.items())}
        loss = torch.func.functional_call(self._objective, given, (batch,))
        # A buffer that forward() assigned anew is in `given`, perhaps with a graph.
        self._buffers = {name: given[f"module.{name}"].detach() for name in self._buffers}
        return loss

    def separate(self) -> ModuleTask:
        other = copy.copy(self)
        other._source = self._source.separate()
        other._buffers = {name: b.clone() for name, b in self._buffers.items()}
        return other

    def buffers(self) -> Params:
        return self._buffers

    def load_buffers(self, buffers: Params) -> None:
        self._buffers = buffers

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        if self._tests is None:
            return {}
        inputs, targets = self._tests()
        classifies = self._criterion is not None and not targets.is_floating_point()
        loss = correct = 0.0
        self.module.eval()
        try:
            for x, y in zip(inputs.split(TEST_SLICE), targets.split(TEST_SLICE), strict=True):
                if self._criterion is None:
                    loss += self._loss(params, (x, y)).item() * len(x)
                    continue
                given = {**params, **self._buffers}
                outputs = torch.func.functional_call(self.module, given, (x,))
                loss += self._criterion(outputs, y).item() * len(x)
                if classifies:
                    correct += (outputs.argmax(-1) == y).float().mean().item() * len(x)
        finally:
            self.module.train()
        figures = {"loss": loss / len(inputs)}
        return {**figures, "accuracy": correct / len(inputs)} if classifies else figures


class _Objective(nn.Module):
    """The loss of a batch as a module's forward pass, which ``functional_call`` needs."""

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


@dataclass(frozen=True)
class _Supervised:
    """A criterion of outputs and targets as a loss of module and batch."""

    criterion: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, tuple) or len(batch) != 2:
            parts = f"of {len(batch)} tensors" if isinstance(batch, tuple) else type(batch).__name__
            raise ValueError(
                f"a criterion of (outputs, targets) needs batches of (inputs, targets), and a "
                f"batch is one {parts}: give loss=, a function of (module, batch), instead"
            )
        inputs, targets = batch
        return self.criterion(module(inputs), targets)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"build must return an nn.Module, and returned a {type(module).__name__}")
    lazy = [name for name, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{', '.join(lazy)} of {type(module).__name__} have no shape before a first forward "
            f"pass: let build run one, or give the sizes"
        )


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


class FixedTask(TaskFamily):
    """The family with one member: only initial parameters and batches differ between runs.

    Args:
        task: the member.
        stackable: whether its loss runs under ``vmap``; found out by trying if not given. It does
            not with dropout, batch norm that tracks statistics, or batches of changing shapes: the
            forward passes of its optimizees are then computed one after another.
    """

    def __init__(self, task: Task, *, stackable: bool | None = None) -> None:
        self.task = task
        if stackable is not None:
            self.stackable = stackable
            self.alone_because = "it was declared with stackable=False"

    @cached_property
    def stackable(self) -> bool:  # type: ignore[override]
        obstacle = obstacle_to_stacking(self.task)
        if obstacle is not None:
            self.alone_because = f"its loss cannot be computed for several at once ({obstacle})"
        return obstacle is None

    def sample(self, generator: Generator) -> Task:
        return self.task


@dataclass(frozen=True)
class EvaluationTask:
    """A builder of a task that never meta-trains.

    Attributes:
        make: makes the task.
        steps: length of its runs in the field, which its users would take; 0 outside of the field.
        quick: length of its runs in the field's quick tier, a few seconds of one core.
        data_set: the image set of which it reads all training images.
    """

    make: Callable[[DataOptions], Task]
    steps: int = 0
    quick: int = 0
    data_set: str | None = None

    def __call__(self, options: TaskOptions) -> TaskFamily:
        family = FixedTask(self.make(options.data), stackable=False)
        if self.data_set is not None:
            family.data_sets, family.halved = (self.data_set,), False
        return family


def obstacle_to_stacking(task: Task) -> str | None:
    """Reason, in a line, why ``vmap`` cannot compute two optimizees at once, or ``None``."""
    generators = [seeded("stacking", index) for index in range(2)]
    task = task.separate()  # what a forward pass leaves behind must not stay in the original
    try:
        initial = [task.init(generator) for generator in generators]
        batches = [task.batch(generator) for generator in generators]
        before = {name: buffer.clone() for name, buffer in task.buffers().items()}
        with torch.no_grad(), global_generator_seeded("stacking"):
            task.loss(initial[0], batches[0])
        updated = [name for name, b in task.buffers().items() if not torch.equal(b, before[name])]
        if updated:
            return f"it updates the buffers {', '.join(updated)}"
        params = {name: torch.stack([p[name] for p in initial]) for name in initial[0]}
        batch = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad(), global_generator_seeded("stacking"):
            together = torch.vmap(task.loss)(params, batch)
            again = torch.vmap(task.loss)(params, batch)
    except Exception as error:  # whatever a loss of the user's raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if torch.equal(together, again) else "it keeps state from call to call"


class TaskMixture(TaskFamily):
    """A family that draws each task from one of several families.

    Example:
        >>> mixture = TaskMixture({"deep": deep, "wide": wide}, {"deep": 3, "wide": 1})

    Args:
        members: tasks or families by name.
        weights: relative frequencies by the same names, positive; equal if not given.

    Raises:
        ValueError: no members, or weights that do not fit them.
    """

    stackable = False

    def __init__(
        self,
        members: Mapping[str, Task | TaskFamily],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not members:
            raise ValueError("a mixture needs at least one task")
        given = dict.fromkeys(members, 1.0) if weights is None else dict(weights)
        if set(given) != set(members):
            raise ValueError(
                f"a mixture of {', '.join(members)} needs a weight for each and no other, got "
                f"weights for {', '.join(given) or 'none'}"
            )
        wrong = [f"{n}: {w}" for n, w in given.items() if not (w > 0 and math.isfinite(w))]
        if wrong:
            raise ValueError(
                f"weights of tasks must be positive and finite, got {', '.join(wrong)}"
            )
        self.members = {name: as_family(member) for name, member in members.items()}
        total = sum(given.values())
        self.shares = {name: given[name] / total for name in members}
        families = self.members.values()
        self.data_sets = tuple(dict.fromkeys(name for f in families for name in f.data_sets))
        self.halved = all(family.halved for family in families)

    def sample(self, generator: Generator) -> Task:
        shares = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        drawn = int(torch.multinomial(shares, 1, generator=generator))
        return list(self.members.values())[drawn].sample(generator)


def as_family(task: Task | TaskFamily) -> TaskFamily:
    """The family of a single task; a family is returned as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(task, TaskFamily):
        return task
    if not isinstance(task, Task):
        raise ValueError(
            f"a task must be a Task or a TaskFamily, and is a {type(task).__name__}: "
            f"ModuleTask(module, batches, criterion) makes one of a module"
        )
    return FixedTask(task)
