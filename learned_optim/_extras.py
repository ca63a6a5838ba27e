"""The package's optional dependencies, and how to install them."""

#: Packages of every extra, by the names that they are imported by.
EXTRAS = {
    "meta": (
        "filelock", "matplotlib", "numpy", "pydantic", "scipy", "sklearn", "tensorboard", "tomli",
        "torchvision", "tqdm", "tyro",
    ),
}  # fmt: skip


def how_to_install(extra: str) -> str:
    """What to do about a missing package, for the end of an error."""
    return f"install the extra {extra!r} (pip install '.[{extra}]' in a checkout of learned_optim)"
