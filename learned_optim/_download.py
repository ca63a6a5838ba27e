"""Checkpoints from repositories of the Hugging Face Hub; nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from pathlib import Path

from learned_optim.checkpoint import FORMAT, FORMAT_VERSION, CheckpointError

#: Name of the checkpoint file inside a folder or a Hub repository.
CHECKPOINT_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``user/repo`` or ``user/repo@revision``."""
    user, _, repo = text.partition("/")
    return _HUB_ID.match(text) is not None and not {user, repo} & {".", ".."}


def download(hub_id: str, *, local_files_only: bool = False) -> Path:
    """The checkpoint file of a Hub repository, through the Hub's cache.

    ``config.json`` comes first, so that a repository of something else is refused before its
    weights are fetched; the weights are then taken from the same commit.

    Args:
        hub_id: ``"user/repo"``, optionally ``"@revision"``.
        local_files_only: answer from the cache alone.

    Raises:
        FileNotFoundError: no such repository, revision or file, or no way to reach the Hub.
        CheckpointError: the repository is no learned_optim rule, or of a newer format.
    """
    repo, _, revision = hub_id.partition("@")
    try:
        config = _fetch(repo, CONFIG_FILE, revision or None, local_files_only)
    except FileNotFoundError as error:
        if getattr(error, "missing_entry", False):
            raise CheckpointError(
                f"the Hub repository {hub_id!r} has no {CONFIG_FILE}: it is no learned_optim rule"
            ) from error
        raise
    _check_config(hub_id, config)
    commit = config.parent.name  # the cache keeps a snapshot's files in a folder of that name
    return _fetch(repo, CHECKPOINT_FILE, commit, local_files_only)


class _HubFileError(FileNotFoundError):
    """A file the Hub did not give us."""

    #: The repository is there and the file is not.
    missing_entry = False


def _fetch(repo: str, file: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                local_files_only=local_files_only or not _answers(repo, file, revision),
                library_name=FORMAT,
            )
        )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        at = f"{repo}@{revision}" if revision else repo
        cause = _cause(error, at, file, local_files_only)
        if not isinstance(error, hub_errors.LocalEntryNotFoundError):
            cause += f" ({_first_line(error)})"
        failure = _HubFileError(cause)
        failure.missing_entry = isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(
            error, hub_errors.LocalEntryNotFoundError
        )
        raise failure from error


def _answers(repo: str, file: str, revision: str | None) -> bool:
    """True if the Hub answers one request, if only with an error.

    Where it does not, :func:`hf_hub_download` would try six times, for half a minute.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except (hub_errors.HfHubHTTPError, ValueError):
        return True
    except Exception:  # a timeout or no connection; the type depends on the client's HTTP library
        return False
    return True


def _cause(error: Exception, at: str, file: str, local_files_only: bool) -> str:
    """What went wrong and what to do, in one sentence."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        if local_files_only or constants.HF_HUB_OFFLINE:
            why = "local_files_only was asked for" if local_files_only else "HF_HUB_OFFLINE is set"
            return f"{file} of the Hub repository {at!r} is not in the local cache, and {why}"
        return (
            f"the Hub could not be reached for {at!r} and {file} is not in the local cache: check "
            f"the network, or use a shipped checkpoint"
        )
    if isinstance(error, hub_errors.GatedRepoError):
        return f"the Hub repository {at!r} is gated: ask its owner for access, then log in"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"the Hub has no repository {at!r}, or it is private: check the spelling, or log in "
            f"with `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"the Hub repository has no such revision: {at!r}"
    if isinstance(error, hub_errors.EntryNotFoundError):
        return f"the Hub repository {at!r} has no file {file}, and only safetensors are loaded"
    return f"{file} could not be had from the Hub repository {at!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_config(hub_id: str, path: Path) -> None:
    """Refuse repositories of other libraries and of newer formats, from ``config.json``."""
    try:
        config = json.loads(path.read_text())
        found = config.get("format"), int(config.get("format_version", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} of {hub_id!r} is not readable: {error}") from error
    if found[0] != FORMAT:
        raise CheckpointError(
            f"the Hub repository {hub_id!r} is no learned_optim rule: its {CONFIG_FILE} says "
            f"format={found[0]!r}"
        )
    if found[1] != FORMAT_VERSION:
        raise CheckpointError(
            f"the Hub repository {hub_id!r} has checkpoint format version {found[1]} and this "
            f"release reads {FORMAT_VERSION}: pip install --upgrade learned-optim"
        )
