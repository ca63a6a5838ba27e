"""Checkpoints from repositories of the Hugging Face Hub. Nothing is unpickled."""

from __future__ import annotations

import json
import re
from pathlib import Path

from learned_optim.checkpoint import FORMAT, CheckpointError, check_format

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

    ``config.json`` comes first, so that a foreign repository is refused before its weights are
    fetched. The weights are taken from the same commit.

    Args:
        hub_id: ``"user/repo"``, optionally ``"@revision"``.
        local_files_only: read the cache alone.

    Raises:
        FileNotFoundError: no such repository, revision or file, or no way to reach the Hub.
        CheckpointError: the repository is no learned_optim rule, or of a newer format.
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
    except errors.EntryNotFoundError as error:
        if file == CONFIG_FILE:
            raise CheckpointError(
                f"the Hub repository {at!r} has no {CONFIG_FILE}: it is no learned_optim rule"
            ) from error
        cause = f"the Hub repository {at!r} has no file {file}, and only safetensors are loaded"
        raise FileNotFoundError(f"{cause} ({_first_line(error)})") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        if isinstance(error, errors.GatedRepoError):
            cause = f"the Hub repository {at!r} is gated: ask its owner for access, then log in"
        elif isinstance(error, errors.RepositoryNotFoundError):
            cause = (
                f"the Hub has no repository {at!r}, or it is private: check the spelling, or log "
                f"in with `hf auth login`"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            cause = f"the Hub repository has no such revision: {at!r}"
        else:
            cause = f"{file} could not be had from the Hub repository {at!r}"
        raise FileNotFoundError(f"{cause} ({_first_line(error)})") from error


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
