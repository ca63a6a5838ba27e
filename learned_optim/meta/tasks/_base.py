"""What an optimizee is: initial parameters, a source of batches and a loss, as pure functions."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.meta.data import DataOptions
from learned_optim.meta.seeding import global_generator_seeded, seeded

#: Examples per forward pass when a held-out set is tested.
TEST_SLICE = 1000

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]


class Task(ABC):
    """One thing to optimize. Stateless: all randomness comes from the generators passed in."""

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


class TaskFamily(ABC):
    """A distribution of tasks.

    All tasks of a ``stackable`` family share parameter shapes, batch shapes and the loss function
    (what differs between them is in their batches), so that several can be trained side by side
    under ``vmap``.
    """

    stackable: bool = True
    #: What an error says of a family that is not stackable.
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
        build: makes the module; called under a seeded global generator, so its own initialization
            is reproducible.
        batches: ``generator -> (inputs, targets)``.
        criterion: ``(outputs, targets) -> loss`` of shape ``()``.
        init_std: weights ~ N(0, init_std^2) and biases 0 (one-dimensional parameters), as in the
            thesis; ``None`` keeps the module's own initialization.
        tests: held-out ``(inputs, targets)``, or ``None``. Their loss is reported and, where the
            targets are classes, the accuracy.

    Buffers (running statistics of batch norm) belong to the module: :meth:`init` resets them and
    :meth:`loss` updates them. Optimizees of such a module, and of one with dropout, are trained one
    after another: see :class:`FixedTask`. Parameters with ``requires_grad=False`` stay as ``build``
    made them the first time, under a fixed seed.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        batches: Callable[[Generator], Batch],
        criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        *,
        init_std: float | None = None,
        tests: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._build = build
        self._batches = batches
        self._criterion = criterion
        self._init_std = init_std
        self._tests = tests
        with global_generator_seeded("module"):  # frozen parameters: the same in every process
            self.module = build()
        self._buffers = {name: b.clone() for name, b in self.module.named_buffers()}

    def init(self, generator: Generator) -> Params:
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self._buffers[name])
        if self._init_std is None:
            seed = int(torch.randint(2**62, (), generator=generator))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fresh = self._build()
            return {name: p.detach().clone() for name, p in _trainable(fresh)}
        return {
            name: self._init_std * torch.randn(p.shape, generator=generator)
            if p.dim() > 1
            else torch.zeros_like(p)
            for name, p in _trainable(self.module)
        }

    def batch(self, generator: Generator) -> Batch:
        return self._batches(generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        inputs, targets = batch
        outputs = torch.func.functional_call(self.module, params, (inputs,))
        return self._criterion(outputs, targets)

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, float]:
        if self._tests is None:
            return {}
        inputs, targets = self._tests()
        self.module.eval()
        try:
            # In slices, because a test set on a convolutional network fills gigabytes at once.
            slices = zip(inputs.split(TEST_SLICE), targets.split(TEST_SLICE), strict=True)
            weights, losses, correct = [], [], []
            for x, y in slices:
                outputs = torch.func.functional_call(self.module, params, (x,))
                weights.append(float(len(x)))
                losses.append(self._criterion(outputs, y).item() * len(x))
                if not y.is_floating_point():
                    correct.append((outputs.argmax(-1) == y).float().mean().item() * len(x))
        finally:
            self.module.train()
        figures = {"loss": sum(losses) / sum(weights)}
        if correct:
            figures["accuracy"] = sum(correct) / sum(weights)
        return figures


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def evaluation_only(name: str, options: TaskOptions) -> None:
    """Refuse to build a family for meta-training that has no examples set apart for it.

    Raises:
        ValueError: ``options.split`` is ``"meta"``.
    """
    if options.split == "meta":
        raise ValueError(
            f"{name!r} is for evaluation only: meta-training on it would leak the evaluation. To "
            f"meta-train on your own data, write a family of your own"
        )


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` with the gradient of ``surrogate``, both of shape ``()``.

    For training that does not descend the figure it is about, as policy gradients and adversarial
    pairs do.
    """
    return surrogate - surrogate.detach() + value.detach()


@dataclass(frozen=True)
class Horizon:
    """For how many steps a task of the field is trained."""

    steps: int
    """In the whole field: what its users would take."""
    quick: int
    """In the quick tier: a few seconds of one core."""


class FixedTask(TaskFamily):
    """The family with one member: only initial parameters and batches differ between runs.

    Args:
        task: the member.
        stackable: whether its loss runs under ``vmap``; found out by trying if not given. It does
            not with dropout, batch norm that tracks statistics, or batches of changing shapes: its
            optimizees then train one after another.
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


def obstacle_to_stacking(task: Task) -> str | None:
    """Why two optimizees of ``task`` cannot share a forward pass, in a line, or ``None``."""
    generators = [seeded("stacking", index) for index in range(2)]
    try:
        initial = [task.init(generator) for generator in generators]
        batches = [task.batch(generator) for generator in generators]
        params = {name: torch.stack([p[name] for p in initial]) for name in initial[0]}
        batch = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad(), global_generator_seeded("stacking"):
            together = torch.vmap(task.loss)(params, batch)
            again = torch.vmap(task.loss)(params, batch)
    except Exception as error:  # whatever a loss of the user's raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if torch.equal(together, again) else "it keeps state from call to call"


Builder = Callable[[TaskOptions], TaskFamily]


def evaluation_family(name: str, make: Callable[[DataOptions], Task], *data_sets: str) -> Builder:
    """An entry of ``FAMILIES`` for one task that never meta-trains.

    Args:
        name: its registered name.
        make: builds the task; called once per :func:`build_tasks`.
        *data_sets: image sets of which it reads all training images.
    """

    def build(options: TaskOptions) -> TaskFamily:
        evaluation_only(name, options)
        family = FixedTask(make(options.data), stackable=False)
        family.data_sets, family.halved = data_sets, not data_sets
        return family

    return build


def field_tasks() -> dict[str, Horizon]:
    """The field: tasks that people recognise, by name, from the ``FIELD`` table of every module."""
    found: dict[str, Horizon] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(getattr(module, "FIELD", {}))
    return found


def _families() -> dict[str, Builder]:
    """Every module of this package contributes its ``FAMILIES``."""
    found: dict[str, Builder] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(module.FAMILIES)
    return found


def described_families() -> dict[str, list[str]]:
    """Names of the task families by what their module says of them in its first line."""
    found: dict[str, list[str]] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        about = (module.__doc__ or "").strip().partition("\n")[0]
        found[about.rstrip(".")] = sorted(module.FAMILIES)
    return found


def task_names() -> list[str]:
    """Names of all registered task families."""
    return sorted(_families())


def build_tasks(name: str, options: TaskOptions | None = None) -> TaskFamily:
    """The task family registered under ``name``.

    Args:
        name: a registered name, or ``"module:name"`` for an entry of the ``FAMILIES`` table of any
            importable module: your own tasks, in recipes and on the command line too.
        options: which split, and where data is.

    Raises:
        ValueError: unknown name (the message lists those that exist), or the family has no
            images that may meta-train.
        FileNotFoundError: its data is not there.
    """
    module, _, own = name.rpartition(":")
    families = _own_table(module, "FAMILIES") if module else _families()
    if own not in families:
        raise unknown_name("task", name, [f"{module}:{n}" if module else n for n in families])
    return families[own](options or TaskOptions())


def field_horizon(name: str) -> Horizon:
    """For how many steps a task of the field is trained.

    Args:
        name: a registered name, or ``"module:name"`` for an entry of one's own ``FIELD`` table.

    Raises:
        ValueError: the task has no stated number of steps.
    """
    module, _, own = name.rpartition(":")
    table: dict[str, Horizon] = _own_table(module, "FIELD") if module else field_tasks()
    if own not in table:
        raise ValueError(
            f"the task {name!r} is not of the field: the FIELD table of its module states no "
            f"number of steps for it. Known: {', '.join(sorted(table)) or 'none'}"
        )
    return table[own]


def _own_table(module: str, table: str) -> dict[str, Any]:
    """``FAMILIES`` or ``FIELD`` of a module of the user's."""
    try:
        found: dict[str, Any] = getattr(importlib.import_module(module), table)
    except (ModuleNotFoundError, AttributeError) as error:
        content = {"FAMILIES": "functions of TaskOptions", "FIELD": "numbers of steps (Horizon)"}
        raise ValueError(
            f"no tasks from module {module!r} ({error}): it must be importable (PYTHONPATH) and "
            f"define {table}, a table from names to {content[table]}"
        ) from error
    return found
