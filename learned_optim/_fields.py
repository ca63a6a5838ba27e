"""Checks of a dataclass's values against its annotations."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(config: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    Annotations that only a type checker can resolve are not checked.

    Raises:
        ValueError: a value has another type than its field, or is none of the choices.
    """
    try:
        hints = get_type_hints(type(config))
    except NameError:
        return
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"{field.name} must be {_described(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint in (int, float):  # Python's True is an int, and an int is a fine float
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
