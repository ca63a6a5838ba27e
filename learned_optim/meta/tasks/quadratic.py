"""Random quadratics ||W theta - y||^2 (thesis section 4.2, Andrychowicz et al. 2016, 4.1)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from learned_optim.meta.tasks._base import Batch, Params, Task, TaskFamily


class Quadratic(Task):
    """One draw of ``W``, ``(n, n)``, and ``y``, ``(n,)``; every batch is the pair itself."""

    def __init__(self, w: Tensor, y: Tensor) -> None:
        self.w, self.y = w, y

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.zeros_like(self.y)}

    def batch(self, generator: Generator) -> Batch:
        return self.w, self.y

    def loss(self, params: Params, batch: Batch) -> Tensor:
        w, y = batch
        return (w @ params["theta"] - y).square().sum()


class Quadratics(TaskFamily):
    """``W`` (size x size) and ``y`` (size) with entries ~ N(0, 1); theta starts at 0."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def sample(self, generator: Generator) -> Quadratic:
        w = torch.randn(self.size, self.size, generator=generator)
        return Quadratic(w, torch.randn(self.size, generator=generator))


FAMILIES = {"quadratic": lambda options: Quadratics()}
