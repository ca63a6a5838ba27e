"""Context managers that keep autocast, matmul precision and inference mode out of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


def plain_arithmetic(devices: set[str]) -> AbstractContextManager[object]:
    """Switches autocast and reduced matmul precision off on these device types.

    Default dtype and device need nothing: code of the step names its dtypes and devices.
    """
    if torch.compiler.is_compiling():
        return torch.autocast("cpu", enabled=False) if "cpu" in devices else nullcontext()
    casting = [kind for kind in devices if kind != "meta" and torch.is_autocast_enabled(kind)]
    precision = torch.get_float32_matmul_precision()
    if not casting and precision == "highest":
        return nullcontext()
    stack = ExitStack()
    for kind in casting:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if precision != "highest":
        stack.enter_context(_matmul_precision(precision))
    return stack


@contextmanager
def _matmul_precision(before: str) -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def outliving_inference_mode() -> Iterator[None]:
    """No graph and no inference mode: tensors made here may be changed anywhere."""
    with torch.inference_mode(False), torch.no_grad():
        yield
