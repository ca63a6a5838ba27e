"""Warnings that point at the user's line."""

import sys
import warnings

#: Packages and modules whose frames lie between the user's line and a warning.
_BETWEEN = {
    "learned_optim", "torch", "lightning", "pytorch_lightning", "accelerate", "transformers",
    "contextlib", "functools",
}  # fmt: skip


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the user's line, outside torch and trainers."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _package(frame.f_globals) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_once(given: set[str], kind: str, message: str) -> None:
    """Issue a warning of a kind that has not been given."""
    if kind not in given:
        given.add(kind)
        warn(message)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
