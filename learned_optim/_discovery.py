"""Registries that imports fill, and errors about their names."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType


def import_submodules(package: str) -> Iterator[ModuleType]:
    """Import the public submodules of ``package`` in the order of names."""
    module = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"{module.__name__}.{info.name}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error: the nearest known name, if any."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: list[str]) -> ValueError:
    """The error for an unregistered name; it lists the registered ones."""
    listing = ", ".join(sorted(known)) or "none"
    return ValueError(f"unknown {kind} {name!r}; known: {listing}{did_you_mean(name, known)}")
