"""Update rules by name: shipped checkpoints, files, repositories of the Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from learned_optim._discovery import did_you_mean, unknown_name
from learned_optim.checkpoint import (
    BEST_FILE,
    FORMAT,
    CheckpointError,
    check_format,
    read_checkpoint,
)
from learned_optim.rules import UpdateRule

#: Names that move on to better weights. ``LearnedOptimizer(params)`` uses ``default``.
ALIASES = {"default": "eigenbasis", "default-fast": "diagonal"}

#: Name of the checkpoint file inside a folder or a Hub repository.
CHECKPOINT_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def _folder() -> Path:
    """The shipped checkpoints: in the installed package, or beside a checkout's."""
    package = Path(__file__).parent
    installed = package / "pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def list_pretrained() -> list[str]:
    """Names of the shipped checkpoints, aliases included."""
    names = {path.stem for path in _folder().glob("*.safetensors")}
    return sorted(names | {alias for alias, name in ALIASES.items() if name in names})


def checkpoint_path(source: str | os.PathLike[str], *, local_files_only: bool = False) -> Path:
    """The checkpoint file of a shipped name, file, folder or Hub id.

    Only a Hub id touches the network. Arguments and errors are those of :func:`load_rule`.
    """
    text = os.fspath(source)
    if text in list_pretrained():
        return _folder() / f"{ALIASES.get(text, text)}.safetensors"
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return path
    is_path = path.suffix == ".safetensors" or not isinstance(source, str)
    maybe_hub = not is_path and is_hub_id(text)
    if maybe_hub and ("@" in text or not path.parent.is_dir()):  # else more likely a mistyped path
        return _download(text, local_files_only)
    if not is_path and path.name == text:
        raise unknown_name("checkpoint", text, list_pretrained())
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = did_you_mean(str(path), map(str, beside))
    message = f"no checkpoint file or folder at {path}{near}"
    if maybe_hub:
        message += (
            f"{'' if near else '.'} A Hub repository of that name, where a folder {path.parent} "
            f"exists, is {text}@main"
        )
    raise FileNotFoundError(message)


def _in_folder(folder: Path) -> Path:
    """The checkpoint of a repository, a finished run or an unfinished run."""
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    for name in (CHECKPOINT_FILE, f"{folder.resolve().name}.safetensors"):
        if name in found:
            return found[name]
    others = [name for name in found if name != BEST_FILE]
    if len(others) > 1:
        raise FileNotFoundError(
            f"{folder} holds several checkpoints ({', '.join(others)}): name the file"
        )
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in the folder {folder}: it holds no {CHECKPOINT_FILE} "
            f"or other .safetensors file"
        )
    return found[others[0] if others else BEST_FILE]


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


# ---- repositories of the Hub; nothing is unpickled


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``user/repo`` or ``user/repo@revision``."""
    user, _, repo = text.partition("/")
    return _HUB_ID.match(text) is not None and not {user, repo} & {".", ".."}


def _download(hub_id: str, local_files_only: bool) -> Path:
    """The checkpoint file of a Hub repository, through the Hub's cache.

    ``config.json`` comes first, so that a foreign repository is refused before its weights are
    fetched. The weights are taken from the same commit. Errors are those of :func:`load_rule`.
    """
    repo, _, revision = hub_id.partition("@")
    config = _fetch(repo, CONFIG_FILE, revision or None, local_files_only)
    try:
        header = dict(json.loads(config.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} of {hub_id!r} is not readable: {error}") from error
    check_format(f"the Hub repository {hub_id!r}", header)
    commit = config.parent.name  # the cache keeps a snapshot's files in a folder of that name
    return _fetch(repo, CHECKPOINT_FILE, commit, local_files_only)


def _fetch(repo: str, file: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download

    at = f"{repo}@{revision}" if revision else repo
    try:
        cached_only = local_files_only or not _answers(repo, file, revision)
        return Path(
            hf_hub_download(
                repo, file, revision=revision, local_files_only=cached_only, library_name=FORMAT
            )
        )
    except errors.LocalEntryNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            why = "local_files_only was asked for" if local_files_only else "HF_HUB_OFFLINE is set"
            cause = f"{file} of the Hub repository {at!r} is not in the local cache, and {why}"
        else:
            cause = (
                f"the Hub could not be reached for {at!r} and {file} is not in the local cache: "
                f"check the network, or use a shipped checkpoint"
            )
        raise FileNotFoundError(cause) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        if isinstance(error, errors.EntryNotFoundError) and file == CONFIG_FILE:
            raise CheckpointError(
                f"the Hub repository {at!r} has no {CONFIG_FILE}: it is no learned_optim rule"
            ) from error
        causes = {
            errors.EntryNotFoundError: f"the Hub repository {at!r} has no file {file}, and only "
            f"safetensors are loaded",
            errors.GatedRepoError: f"the Hub repository {at!r} is gated: ask its owner for "
            f"access, then log in",
            errors.RepositoryNotFoundError: f"the Hub has no repository {at!r}, or it is private: "
            f"check the spelling, or log in with `hf auth login`",
            errors.RevisionNotFoundError: f"the Hub repository has no such revision: {at!r}",
            Exception: f"{file} could not be had from the Hub repository {at!r}",
        }
        cause = next(text for kind, text in causes.items() if isinstance(error, kind))
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{cause} ({first_line})") from error


def _answers(repo: str, file: str, revision: str | None) -> bool:
    """True if the Hub answers one request, if only with an error.

    Where it does not, ``hf_hub_download`` would try six times, for half a minute.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except (errors.HfHubHTTPError, ValueError):
        return True
    except Exception:  # a timeout or no connection; the type depends on the client's HTTP library
        return False
    return True
