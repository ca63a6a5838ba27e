"""Hand-written optimizers to compare with: adding one is one line of :data:`BASELINES`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim._discovery import unknown_name

#: {1, 3} x 10^k over [1e-5, 10]: what every baseline's learning rate is tuned over, per task.
LR_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)

Make = Callable[[Iterable[Tensor], float], Optimizer]


def _schedule_free_adamw(params: Iterable[Tensor], lr: float) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ImportError(
            "the baseline 'schedulefree' needs its package: pip install 'learned-optim[baselines]'"
        ) from error
    optimizer: Any = AdamWScheduleFree(params, lr=lr)
    optimizer.train()
    return optimizer


#: Name -> (parameters, learning rate) -> optimizer; everything else is at its default.
BASELINES: dict[str, Make] = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "nesterov": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr),
    "schedulefree": _schedule_free_adamw,
}


def make_baseline(name: str, params: Iterable[Tensor], lr: float) -> Optimizer:
    """A hand-written optimizer by name.

    Raises:
        ValueError: unknown name; the message lists those that exist.
    """
    if name not in BASELINES:
        raise unknown_name("baseline", name, list(BASELINES))
    return BASELINES[name](params, lr)
