"""What an optimizee is: initial parameters, a source of batches and a loss, as pure functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.meta.data import DataOptions

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

    stackable: ClassVar[bool] = True

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
        ...     batches=lambda generator: (torch.randn(8, 3, generator=generator), torch.ones(8, 1)),
        ...     criterion=nn.functional.mse_loss,
        ... )

    Args:
        build: makes the module; called under a seeded global generator, so its own initialization
            is reproducible.
        batches: ``generator -> (inputs, targets)``.
        criterion: ``(outputs, targets) -> loss`` of shape ``()``.
        init_std: weights ~ N(0, init_std^2) and biases 0 (one-dimensional parameters), as in the
            thesis; ``None`` keeps the module's own initialization.
        tests: held-out ``(inputs, targets)`` for classification accuracy, or ``None``.
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
        with torch.random.fork_rng(devices=[]):
            self.module = build()

    def init(self, generator: Generator) -> Params:
        if self._init_std is None:
            seed = int(torch.randint(2**62, (), generator=generator))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fresh = self._build()
            return {name: p.detach().clone() for name, p in fresh.named_parameters()}
        return {
            name: self._init_std * torch.randn(p.shape, generator=generator)
            if p.dim() > 1
            else torch.zeros_like(p)
            for name, p in self.module.named_parameters()
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
        outputs = torch.func.functional_call(self.module, params, (inputs,))
        return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}


class FixedTask(TaskFamily):
    """The family with one member: only initial parameters and batches differ between runs."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def sample(self, generator: Generator) -> Task:
        return self.task


Builder = Callable[[TaskOptions], TaskFamily]


def _families() -> dict[str, Builder]:
    """Every module of this package contributes its ``FAMILIES``."""
    found: dict[str, Builder] = {}
    for module in import_submodules("learned_optim.meta.tasks"):
        found.update(module.FAMILIES)
    return found


def task_names() -> list[str]:
    """Names of all registered task families."""
    return sorted(_families())


def build_tasks(name: str, options: TaskOptions | None = None) -> TaskFamily:
    """The task family registered under ``name``.

    Raises:
        ValueError: unknown name (the message lists those that exist), or the family has no
            images that may meta-train.
        FileNotFoundError: its data is not there.
    """
    families = _families()
    if name not in families:
        raise unknown_name("task", name, list(families))
    return families[name](options or TaskOptions())
