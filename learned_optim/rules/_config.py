"""Configurations of update rules, and the registry of rules by name."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of every rule's configuration: frozen and JSON-serializable."""


#: Registered rules by name.
RULES: dict[str, Any] = {}


def register(cls: type[Any]) -> None:
    """Register a rule class under its name.

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = RULES.get(cls.name, cls)
    if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"{cls.__qualname__} cannot be named {cls.name!r}: {taken.__qualname__} of "
            f"{taken.__module__} is, and checkpoints know rules by name"
        )
    RULES[cls.name] = cls
