"""Registries that are filled by importing a package's modules, and errors about their names."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType


def import_submodules(package: str) -> Iterator[ModuleType]:
    """Import the direct, public submodules of ``package`` and yield them in name order."""
    module = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"{module.__name__}.{info.name}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error: the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: list[str]) -> ValueError:
    """The error for a name that is not registered; it lists those that are."""
    listing = ", ".join(sorted(known)) or "none"
    return ValueError(f"unknown {kind} {name!r}; known: {listing}{did_you_mean(name, known)}")
