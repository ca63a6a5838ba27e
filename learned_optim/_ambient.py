"""Contexts without autocast, reduced matmul precision and inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def plain_arithmetic(device: str) -> AbstractContextManager[object]:
    """Switches autocast and reduced matmul precision off on this type of device.

    Default dtype and device need nothing: code of the step names its dtypes and devices.
    """
    if torch.compiler.is_compiling():
        return torch.autocast("cpu", enabled=False) if device == "cpu" else nullcontext()
    casting = device != "meta" and torch.is_autocast_enabled(device)
    if casting or torch.get_float32_matmul_precision() != "highest":
        return _switched_off(torch.autocast(device, enabled=False) if casting else nullcontext())
    return nullcontext()


@contextmanager
def _switched_off(autocast: AbstractContextManager[object]) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def outliving_inference_mode() -> Iterator[None]:
    """No graph and no inference mode: tensors may be changed anywhere."""
    with torch.inference_mode(False), torch.no_grad():
        yield
