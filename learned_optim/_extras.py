"""The package's optional dependencies, and how to install them."""

import importlib
from typing import Any

#: Import names of the packages of the extra ``meta``.
META = (
    "filelock", "matplotlib", "numpy", "scipy", "sklearn", "tomli", "torchvision",
    "tqdm", "tyro",
)  # fmt: skip


def how_to_install(extra: str) -> str:
    """The end of an error about a missing package."""
    return f"install the extra {extra!r} (pip install '.[{extra}]' in a checkout of learned_optim)"


def import_extra(module: str) -> Any:
    """Import a module of a package in the extra ``meta``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}: {how_to_install('meta')}") from error
