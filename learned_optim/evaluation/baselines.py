"""Hand-written optimizers to compare with: adding one is one line of :data:`BASELINES`.

A baseline is an optimizer, a schedule and, if its authors promise that it needs no tuning, a
learning rate. Without one, evaluation tunes it per task. Baselines know the number of steps.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim._discovery import unknown_name
from learned_optim._extras import how_to_install
from learned_optim.rules._basis import multiplies_bfloat16

#: {1, 3} x 10^k over [1e-5, 10]: what every baseline's learning rate is tuned over, per task.
LR_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)

#: Share of the run over which schedules raise the learning rate from 0, unless said otherwise.
WARMUP = 0.05

#: Rates at which Muon and SOAP are tried on the field: Muon's best of seven on 23 of 26 tasks.
MATRIX_LRS = (3e-3, 1e-2, 3e-2)

Make = Callable[[list[Tensor], float, int], Optimizer]
#: ``progress -> factor`` of the learning rate; progress is the share of the run that is done.
Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Baseline:
    """A hand-written optimizer with the settings that a user decides.

    Attributes:
        make: ``(parameters, learning rate, total steps) -> optimizer``.
        schedule: factor of the learning rate by progress; ``None`` leaves it constant.
        lr: the learning rate of a rival that claims to need no tuning; ``None``: tuned per task.
        lrs: the only learning rates that are tried on the field; empty: all of its grid.
        package: an optional package that it needs, of the ``baselines`` extra.
        settings: identifies constants in logs of runs, where they differ from another definition.
    """

    make: Make
    schedule: Schedule | None = None
    lr: float | None = None
    lrs: tuple[float, ...] = ()
    package: str | None = None
    settings: str = ""


def warmup_cosine(progress: float, warmup: float = WARMUP) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1.0 - warmup))


def warmup_linear(progress: float, warmup: float = WARMUP) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min(progress / warmup, (1.0 - progress) / (1.0 - warmup))


#: The mark of parameters that Muon leaves to AdamW, as Megatron names it.
OUTER = "is_embedding_or_output_parameter"


def mark_outer(params: dict[str, Tensor], module: nn.Module | None = None) -> None:
    """Mark embeddings, output layers and the first convolution, which Muon leaves to AdamW.

    ``params`` are in the module's order. The output layer is the last matrix, unless
    ``module.output_layers`` names others. Embedding tables, layers named ``embed`` and matrices
    held by no layer (tables of positions) count as embeddings.
    """
    matrices = [name for name, p in params.items() if p.dim() >= 2]
    outer = set(getattr(module, "output_layers", matrices[-1:]))
    outer.update([name for name in matrices if params[name].dim() > 2][:1])
    outer.update(name for name in matrices if "embed" in name)
    for path, part in module.named_modules() if module is not None else ():
        if isinstance(part, nn.Embedding) or any(part.children()):
            own = (name for name, _ in part.named_parameters(recurse=False))
            outer.update(f"{path}.{name}".lstrip(".") for name in own)
    for name in outer & set(params):
        setattr(params[name], OUTER, True)


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for all other parameters.

    Parameters marked by :func:`mark_outer` go to AdamW. Kernels of convolutions are matrices of
    one row per output channel. Both parts have AdamW's weight decay of 0.01.

    Args:
        params: the parameters.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of the rest; ``lr`` if not given.
        betas: of AdamW.
        adjust_lr_fn: ``"match_rms_adamw"`` gives Muon's updates the size of AdamW's (Liu et al.
            2025), so that one learning rate suits both; ``None`` is Muon's own convention.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        adjust_lr_fn: str | None = "match_rms_adamw",
    ) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        hidden = [p for p in params if p.dim() >= 2 and not getattr(p, OUTER, False)]
        #: Each hidden parameter as a matrix that shares its memory.
        self.matrices = [(p, p.detach().view(len(p), -1)) for p in hidden]
        self.parts: list[Optimizer] = []
        self.has_units = multiplies_bfloat16(params[0].device)
        if hidden:
            muon: Any = torch.optim.Muon  # older versions of torch have none
            flat = [matrix for _, matrix in self.matrices]
            self.parts.append(muon(flat, lr=lr, weight_decay=0.01, adjust_lr_fn=adjust_lr_fn))
        others = [p for p in params if all(p is not q for q in hidden)]
        if others:
            lr = lr if adamw_lr is None else adamw_lr
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.01))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for p, matrix in self.matrices:
            matrix.grad = None if p.grad is None else p.grad.view_as(matrix)
        # Muon multiplies in bfloat16: thirty times as long where the processor lacks units for it.
        exact = mock.patch.object(Tensor, "bfloat16", Tensor.float)
        for part in self.parts:
            with nullcontext() if self.has_units else exact:
                part.step()
            self.state.update(part.state)
        return loss


def _torch(optimizer: Callable[..., Optimizer], **options: Any) -> Make:
    """``optimizer`` with these options, which needs no number of steps."""
    return lambda params, lr, total_steps: optimizer(params, lr=lr, **options)


def _packaged(package: str, name: str, lr: float | None = None, **options: Any) -> Baseline:
    """An optimizer of an optional package, which is imported when one is made."""

    def make(params: list[Tensor], lr: float, total_steps: int) -> Optimizer:
        found: Optimizer = getattr(importlib.import_module(package), name)(params, lr=lr, **options)
        return found

    return Baseline(make, lr=lr, package=package)


def _schedule_free(params: list[Tensor], lr: float, total_steps: int) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    steps = math.ceil(WARMUP * total_steps)
    optimizer: Any = AdamWScheduleFree(params, lr=lr, warmup_steps=steps)
    optimizer.train()
    return optimizer


_adam, _adamw = _torch(torch.optim.Adam), _torch(torch.optim.AdamW)
# AlgoPerf's calibrated NadamW (Dahl et al. 2023; Kasimbeg et al. 2025). So large a momentum decay
# is none: torch's beta_1 (1 - 0.96^(t decay) / 2) is then beta_1.
_nadamw = _torch(
    torch.optim.NAdam, betas=(0.933, 0.9955), weight_decay=0.081,
    decoupled_weight_decay=True, momentum_decay=1e9,
)  # fmt: skip
_prodigy = _packaged("prodigyopt", "Prodigy", lr=1.0)
# The constants of Vyas et al. 2024; vectors have no eigenbasis. Its first step only observes.
_soap = _packaged(
    "pytorch_optimizer", "SOAP",
    betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10,
)  # fmt: skip

_TUNED: dict[str, Baseline] = {
    "sgd": Baseline(_torch(torch.optim.SGD)),
    "nesterov": Baseline(_torch(torch.optim.SGD, momentum=0.9, nesterov=True)),
    "rmsprop": Baseline(_torch(torch.optim.RMSprop)),
    "adam": Baseline(_adam),
    "adamw": Baseline(_adamw),
    "muon": Baseline(_torch(MuonAdamW), lrs=MATRIX_LRS, settings="hidden, decay 0.01"),
    "soap": replace(_soap, lrs=MATRIX_LRS),
}

#: Every hand-written optimizer by name; what is not said is at its class's default.
BASELINES: dict[str, Baseline] = {
    # Tuned per task, each with three schedules.
    **_TUNED,
    **{f"{name}-cosine": replace(b, schedule=warmup_cosine) for name, b in _TUNED.items()},
    **{f"{name}-linear": replace(b, schedule=warmup_linear) for name, b in _TUNED.items()},
    "schedulefree": Baseline(_schedule_free, package="schedulefree"),
    # At their authors' constants.
    "adam-1e-3": Baseline(_adam, lr=1e-3),
    "adamw-cosine-1e-3": Baseline(_adamw, warmup_cosine, lr=1e-3),
    "nadamw-1.75e-3": Baseline(_nadamw, partial(warmup_cosine, warmup=0.02), lr=1.75e-3),
    "schedulefree-2.5e-3": Baseline(_schedule_free, lr=2.5e-3, package="schedulefree"),
    # Mishchenko and Defazio 2024; the package's README recommends the cosine.
    "prodigy": _prodigy,
    "prodigy-cosine": replace(_prodigy, schedule=partial(warmup_cosine, warmup=0.0)),
    # Defazio and Mishchenko 2023.
    "dadapt-adam": _packaged("dadaptation", "DAdaptAdam", lr=1.0),
    # Its README's rates: 0.02, and 3e-4 for AdamW's part.
    "muon-cosine-2e-2": Baseline(
        _torch(MuonAdamW, adamw_lr=3e-4, betas=(0.9, 0.95), adjust_lr_fn=None),
        warmup_cosine,
        lr=2e-2,
    ),
    "soap-cosine-3e-3": replace(_soap, schedule=warmup_cosine, lr=3e-3),
}


def baseline(name: str) -> Baseline:
    """An entry of :data:`BASELINES`; an unknown name raises ``ValueError``, which lists them."""
    if name not in BASELINES:
        raise unknown_name("baseline", name, list(BASELINES))
    return BASELINES[name]


def why_missing(name: str) -> str | None:
    """The requirement that a baseline lacks, with the remedy, or ``None``."""
    package = baseline(name).package
    if name.startswith("muon") and not hasattr(torch.optim, "Muon"):
        return f"the baseline {name!r} needs torch.optim.Muon: torch 2.9 or later"
    try:
        importlib.import_module(package or "torch")
    except ImportError:
        return f"the baseline {name!r} needs its package: {how_to_install('baselines')}"
    return None


def make_baseline(name: str, params: Iterable[Tensor], lr: float, total_steps: int) -> Optimizer:
    """A hand-written optimizer by name, its schedule included.

    The schedule sets the learning rate of every group before each step; the first of N steps has a
    progress of 0.5 / N, so that none of them is lost to a factor of 0.

    Args:
        name: a key of :data:`BASELINES`.
        params: the parameters.
        lr: the learning rate, the largest one under a schedule.
        total_steps: steps of the run.

    Raises:
        ValueError: unknown name; the message lists those that exist.
        ImportError: its package is not installed.
    """
    found, missing = baseline(name), why_missing(name)
    if missing:
        raise ImportError(missing)
    optimizer = found.make(list(params), lr, total_steps)
    schedule = found.schedule
    if schedule is not None:
        peaks, steps = [group["lr"] for group in optimizer.param_groups], itertools.count()

        def set_lr(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            factor = schedule(min(1.0, (next(steps) + 0.5) / total_steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak

        optimizer.register_step_pre_hook(set_lr)
    return optimizer
