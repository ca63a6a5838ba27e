"""From a name to an update rule: shipped checkpoints, files, and repositories of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from learned_optim._discovery import unknown_name
from learned_optim.checkpoint import read_checkpoint
from learned_optim.rules import UpdateRule

#: Name of the checkpoint file inside a folder or a Hub repository.
CHECKPOINT_FILE = "model.safetensors"

#: What ``LearnedOptimizer(params)`` uses.
ALIASES = {"default": "mnist"}

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def _folder() -> Path:
    """The shipped checkpoints: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def list_pretrained() -> list[str]:
    """Names of the shipped checkpoints, aliases included."""
    names = {path.stem for path in _folder().glob("*.safetensors")}
    return sorted(names | {alias for alias, name in ALIASES.items() if name in names})


def checkpoint_path(source: str | os.PathLike[str]) -> Path:
    """The checkpoint file behind a shipped name, a file, a folder or a Hub id.

    A shipped name never touches the network; ``user/repo`` or ``user/repo@revision`` does (or
    reads the Hub's local cache), because somebody wrote one.

    Args:
        source: as for :func:`load_rule`.

    Raises:
        ValueError: neither a shipped name nor an existing path nor a Hub id.
        FileNotFoundError: a path that does not exist.
    """
    text = os.fspath(source)
    if text in list_pretrained():
        return _folder() / f"{ALIASES.get(text, text)}.safetensors"
    path = Path(text).expanduser()
    if path.is_dir():
        return path / CHECKPOINT_FILE
    if path.exists() or path.suffix == ".safetensors" or not isinstance(source, str):
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint file at {path}")
        return path
    if _HUB_ID.match(text):
        return _download(text)
    raise unknown_name("checkpoint", text, list_pretrained())


def _download(hub_id: str) -> Path:
    """The checkpoint file of a Hub repository, through the Hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    try:
        return Path(hf_hub_download(repo, CHECKPOINT_FILE, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no checkpoint {CHECKPOINT_FILE} from the Hub repository {hub_id!r}: {error}. "
            f"If a shipped checkpoint was meant, there are: {', '.join(list_pretrained())}"
        ) from error


def load_rule(source: str | os.PathLike[str]) -> UpdateRule:
    """Load an update rule.

    Args:
        source: a shipped name (:func:`list_pretrained`), a ``.safetensors`` file, a folder that
            holds ``model.safetensors``, or a Hub id ``"user/repo"``, optionally ``"@revision"``.

    Returns:
        The rule in evaluation mode.

    Raises:
        ValueError: unknown name; the message lists the shipped ones.
        FileNotFoundError: no such file, or none to be had from the Hub.
        CheckpointError: the file is damaged, foreign or of a newer format.

    Example:
        >>> rule = load_rule("mnist")
        >>> rule.name
        'lstm'
    """
    return read_checkpoint(checkpoint_path(source))[0]


def load_record(source: str | os.PathLike[str]) -> dict[str, Any]:
    """How a checkpoint was made: recipe, seed, commit, figures. Arguments as :func:`load_rule`."""
    return read_checkpoint(checkpoint_path(source))[1]
