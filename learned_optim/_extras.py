"""The package's optional dependencies, and how to install them."""

#: Import names of the packages of an extra.
EXTRAS = {
    "meta": (
        "filelock", "matplotlib", "numpy", "pydantic", "scipy", "sklearn", "tomli", "torchvision",
        "tqdm", "tyro",
    ),
}  # fmt: skip


def how_to_install(extra: str) -> str:
    """The end of an error about a missing package."""
    return f"install the extra {extra!r} (pip install '.[{extra}]' in a checkout of learned_optim)"
