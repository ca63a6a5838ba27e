"""The CPU's step as an operator that graphs of torch.compile call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels import _cpu, _library


def _usable() -> bool:
    return _library.library() is not None


# A constant of the graph: what torch.compiler.assume_constant_result does, without importing the
# tracer, which takes a second.
_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step_(
    params: list[Tensor],
    grads: list[Tensor],
    fast: list[Tensor],
    slow: list[Tensor],
    square: list[Tensor],
    stats: list[Tensor],
    steps: list[Tensor],
    network: list[Tensor],
    updates: list[Tensor],
    rotated: list[int],
    lr: Tensor,
    weight_decay: float,
    maximize: bool,
    warmup: int,
    total_steps: float,
) -> None:
    rate = float(lr)
    if rate == 0:  # the graph could not know it; nothing may change
        for update in updates:
            update.zero_()
        return
    states = [
        dict(zip(_cpu.STATE_KEYS, own, strict=True))
        for own in zip(fast, slow, square, stats, steps, strict=True)
    ]
    grads = [grad.contiguous() for grad in grads]  # inside a graph they may have any strides
    settings = _cpu.StepSettings(rate, weight_decay, maximize, warmup, total_steps or None)
    places: list[Tensor | None] = [None] * len(params)
    for index, update in zip(rotated, updates, strict=True):
        places[index] = update
    if not _cpu.step_(_cpu.StepCall(network, params, grads, states, settings, places)):
        raise RuntimeError(
            "the compiled step refuses these tensors, whose memory overlaps or is not aligned: "
            "call the optimizer's step() outside of torch.compile, or set LEARNED_OPTIM_KERNELS=0"
        )


_operator: Any = torch.library.custom_op(
    "learned_optim::horizon_step_",
    _step_,
    mutates_args=("params", "fast", "slow", "square", "stats", "steps", "updates"),
    device_types="cpu",
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] fast, Tensor(c!)[] slow, "
    "Tensor(d!)[] square, Tensor(e!)[] stats, Tensor(f!)[] steps, Tensor[] network, "
    "Tensor(g!)[] updates, int[] rotated, Tensor lr, float weight_decay, bool maximize, "
    "int warmup, float total_steps) -> ()",
)
_operator.register_fake(lambda *_: None)


def step_(call: _cpu.StepCall) -> bool:
    """See :func:`learned_optim.kernels.step_`, while a graph is traced."""
    network, params, grads, states, settings, updates = call
    m, lr = len(params), settings.lr
    columns = [[state[key] for state in states] for key in _cpu.STATE_KEYS]
    every = [*params, *grads, *(tensor for column in columns for tensor in column), *network]
    if not _cpu.are_plain(every) or any(t.device.type != "cpu" for t in every):
        return False
    if any(t.layout is not torch.strided for t in every):
        return False
    if not all(t.is_contiguous() for t in [*params, *every[2 * m :]]):
        return False
    if any(param.shape != grad.shape for param, grad in zip(params, grads, strict=True)):
        return False
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1):
        return False
    dtypes, weights = [t.dtype for t in every], [weight.shape for weight in network]
    if not _cpu.takes(m, dtypes, weights) or not _usable():
        return False
    if not isinstance(lr, Tensor):  # a tensor: one graph serves all learning rates
        lr = torch.ones((), dtype=torch.float64, device="cpu") * lr
    places = list(updates or ())
    rotated = [index for index, update in enumerate(places) if update is not None]
    _operator(
        list(params), list(grads), *columns, list(network),
        [update for update in places if update is not None], rotated, lr,
        float(settings.weight_decay), bool(settings.maximize), int(settings.warmup),
        float(settings.total_steps or 0.0),
    )  # fmt: skip
    return True
