"""From a name to an update rule: shipped checkpoints, files, and repositories of the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from learned_optim import _download
from learned_optim._discovery import did_you_mean, unknown_name
from learned_optim.checkpoint import BEST_FILE, CheckpointError, read_checkpoint
from learned_optim.rules import UpdateRule

#: Names that move on to better weights. ``LearnedOptimizer(params)`` uses ``default``.
ALIASES = {"default": "eigenbasis", "default-fast": "diagonal"}


def _folder() -> Path:
    """The shipped checkpoints: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def list_pretrained() -> list[str]:
    """Names of the shipped checkpoints, aliases included."""
    names = {path.stem for path in _folder().glob("*.safetensors")}
    return sorted(names | {alias for alias, name in ALIASES.items() if name in names})


def checkpoint_path(source: str | os.PathLike[str], *, local_files_only: bool = False) -> Path:
    """The checkpoint file behind a shipped name, a file, a folder or a Hub id.

    Only a Hub id touches the network. Arguments and errors are those of :func:`load_rule`.
    """
    text = os.fspath(source)
    if text in list_pretrained():
        return _folder() / f"{ALIASES.get(text, text)}.safetensors"
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists() or path.suffix == ".safetensors" or not isinstance(source, str):
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint file at {path}{_beside(path)}")
        return path
    if _download.is_hub_id(text):
        if "@" not in text and path.parent.is_dir():  # more likely a mistyped path
            near = _beside(path) or "."
            raise FileNotFoundError(
                f"no checkpoint file or folder at {path}{near} A Hub repository of that name, "
                f"where a folder {path.parent} exists, is {text}@main"
            )
        return _download.download(text, local_files_only=local_files_only)
    if path.name != text:
        raise FileNotFoundError(f"no checkpoint file or folder at {path}{_beside(path)}")
    raise unknown_name("checkpoint", text, list_pretrained())


def _in_folder(folder: Path) -> Path:
    """The checkpoint of a folder: a repository's, a finished run's, or the best of a run so far."""
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    for name in (_download.CHECKPOINT_FILE, f"{folder.resolve().name}.safetensors"):
        if name in found:
            return found[name]
    others = [name for name in found if name != BEST_FILE]
    if len(others) > 1:
        raise FileNotFoundError(
            f"{folder} holds several checkpoints ({', '.join(others)}): name the file"
        )
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in the folder {folder}: it holds no {_download.CHECKPOINT_FILE} "
            f"or other .safetensors file"
        )
    return found[others[0] if others else BEST_FILE]


def _beside(path: Path) -> str:
    """The end of an error about a path that does not exist: the nearest name beside it."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(str(path), [str(path.parent / name) for name in names])


def load_rule(source: str | os.PathLike[str], *, local_files_only: bool = False) -> UpdateRule:
    """Load an update rule.

    Args:
        source: a shipped name (:func:`list_pretrained`), a ``.safetensors`` file, a folder with a
            checkpoint (``model.safetensors``, or a run folder), or a Hub id ``"user/repo"``,
            optionally ``"@revision"`` (a branch, a tag or a commit).
        local_files_only: take a Hub id from the local cache or fail, without network access.
            ``HF_HUB_OFFLINE=1`` does the same for a whole process.

    Returns:
        The rule in evaluation mode.

    Raises:
        ValueError: unknown name; the message lists the shipped ones.
        FileNotFoundError: no such file, or none from the Hub; the message says whether repository,
            revision, file or network is missing.
        CheckpointError: the file is damaged, foreign or of another format version.

    Example:
        >>> rule = load_rule("mnist")
        >>> rule.name
        'lstm'
    """
    return _read(source, local_files_only)[0]


def load_record(
    source: str | os.PathLike[str], *, local_files_only: bool = False
) -> dict[str, Any]:
    """How a checkpoint was made: recipe, seed, commit, figures. Arguments as :func:`load_rule`."""
    return _read(source, local_files_only)[1]


def _read(
    source: str | os.PathLike[str], local_files_only: bool
) -> tuple[UpdateRule, dict[str, Any]]:
    path = checkpoint_path(source, local_files_only=local_files_only)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        if os.fspath(source) in str(error):
            raise
        raise CheckpointError(f"{os.fspath(source)!r}: {error}") from error
