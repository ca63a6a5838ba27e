"""An update rule as one safetensors file: weights, and a header that rebuilds the rule.

The header's metadata holds ``format``, ``format_version``, ``rule`` (registered name), ``config``
(JSON) and ``record`` (JSON: recipe, seed, commit, figures). Nothing is ever unpickled. A rule keeps
the dtype of its tensors.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learned_optim._fields import check_fields
from learned_optim.rules import UpdateRule, build_rule

FORMAT = "learned_optim"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says what is wrong with it."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place.

    A reader sees the old file or the new one, never half of one, whenever the process dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; a checkpoint is not
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_atomically` for text."""

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON text with sorted keys; NaN and infinities, which JSON has not, become ``null``.

    Raises:
        TypeError: something in ``data`` has no JSON form.
    """
    return json.dumps(_finite(data), sort_keys=True, indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def save_rule(
    rule: UpdateRule, path: str | os.PathLike[str], record: dict[str, Any] | None = None
) -> None:
    """Write an update rule to one safetensors file, atomically.

    Args:
        rule: any registered update rule.
        path: the file to write.
        record: how the rule was made, JSON-serializable: recipe, seed, commit, figures. Numbers
            that are not finite are stored as ``null``.

    Raises:
        TypeError: the rule is not registered under a name, or the record is not JSON.
    """
    if not rule.name:
        raise TypeError(
            f"{type(rule).__name__} has no name, so a file of it could not be loaded again: give "
            f"the class a `name` and define it in a module of learned_optim.rules"
        )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "rule": rule.name,
        "config": json.dumps(rule.config_dict(), sort_keys=True),
        "record": as_json(record or {}),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in rule.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[UpdateRule, dict[str, Any]]:
    """Read a file that :func:`save_rule` wrote.

    Returns:
        ``(rule, record)``: the rule in evaluation mode, and how it was made.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: it is damaged, incomplete or of another "
            f"kind ({error}). Copy or download it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but no learned_optim checkpoint: its header says "
            f"format={metadata.get('format')!r}"
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has checkpoint format version {version!r} and this release reads "
            f"{FORMAT_VERSION}: pip install --upgrade learned-optim"
        )
    try:
        rule = build_rule(metadata["rule"], _json_object(metadata, "config"))
        check_fields(rule.config)
        # Weights load into the dtype they have: casting them would make another rule.
        for key, entry in rule.state_dict(keep_vars=True).items():
            if key in tensors and tensors[key].is_floating_point() and entry.is_floating_point():
                entry.data = entry.data.to(tensors[key].dtype)
        rule.load_state_dict(tensors, strict=True)
        record = _json_object({"record": "{}", **metadata}, "record")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not describe a known update rule: {error}") from error
    return rule.eval(), record


def _json_object(metadata: dict[str, str], entry: str) -> dict[str, Any]:
    value = json.loads(metadata[entry])
    if not isinstance(value, dict):
        raise ValueError(f"its {entry} is no JSON object: {metadata[entry][:40]}")
    return value
