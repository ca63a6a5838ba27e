"""An update rule as one safetensors file.

The header's metadata holds ``format``, ``format_version`` and ``rule`` (registered name); as JSON
``config``, ``use`` (``warmup_steps`` and ``trained_steps`` of the rule) and ``record`` (recipe,
seed, commit, figures); and ``sha256``, a digest of everything else. The same rule and record give
the same bytes. Nothing is unpickled. Weights keep their dtype.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from learned_optim._discovery import unknown_name
from learned_optim._fields import check_fields
from learned_optim._tensors import tensor_bytes
from learned_optim.rules import UpdateRule, build_rule, rule_names

FORMAT = "learned_optim"
FORMAT_VERSION = 2

#: Attributes of a rule that say how its weights are to be used; a checkpoint carries them.
USE = ("trained_steps", "warmup_steps")

#: The best checkpoint so far of a run folder.
BEST_FILE = "best.safetensors"

#: Dtypes that a rule's tensors may have, by safetensors' names.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says why."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` create a file beside ``path``, then move it there.

    Whenever the process dies, a reader sees the old file or the new one, never half of one.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full. The message
            names it, and an older file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed writers; nobody may write meanwhile."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` if ``path`` cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, and a file is to be written")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_atomically` for text."""
    write_atomically(path, lambda temporary: temporary.write_text(text))


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON text with sorted keys; NaN and infinities become ``null``.

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
        ValueError: weights that are not finite, or of no floating dtype of 16 bits or more.
        OSError: the file cannot be written; an older one is as it was.
    """
    if not rule.name:
        raise TypeError(
            f"{type(rule).__name__} has no name, so a file of it could not be loaded again: give "
            f"the class a `name` and define it in a module of learned_optim.rules"
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in rule.state_dict().items()}
    try:
        check_weights(rule, tensors)
    except ValueError as error:
        raise ValueError(f"the rule cannot be saved: {error}") from error
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "rule": rule.name,
        "config": json.dumps(rule.config_dict(), sort_keys=True),
        "use": json.dumps({name: getattr(rule, name) for name in USE}),
        "record": as_json(record or {}),
    }
    metadata["sha256"] = content_digest(metadata, tensors)
    content = _safetensors(metadata, tensors)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _safetensors(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file; the library's own writers order its header at random.

    Eight bytes of the header's length, the header as JSON padded to a multiple of 8 bytes, and the
    tensors, the widest elements first so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, offset = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        part = tensor_bytes(tensors[name])
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(part)],
        }
        parts.append(part)
        offset += len(part)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def content_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata and tensors, the digest itself excepted."""
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    form = {name: [DTYPES[t.dtype], list(t.shape)] for name, t in tensors.items()}
    digest = hashlib.sha256(json.dumps([rest, form], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def check_weights(rule: UpdateRule, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError``, naming the tensor, where the rule cannot compute with these."""
    weights = {name for name, _ in rule.named_parameters()}
    for name, own in rule.state_dict().items():
        if name not in tensors:
            continue  # load_state_dict names those that are missing
        dtype = tensors[name].dtype
        fits = dtype.is_floating_point if own.is_floating_point() else dtype == own.dtype
        if not fits or dtype not in DTYPES:
            wanted = "floating, of 16 bits or more" if own.is_floating_point() else str(own.dtype)
            raise ValueError(f"{name} has dtype {dtype} and should be {wanted}")
        if name in weights and not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} holds values that are not finite")
    found = {str(tensors[name].dtype) for name in weights & tensors.keys()}
    if len(found) > 1:
        raise ValueError(f"its weights have several dtypes: {', '.join(sorted(found))}")


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
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: it is damaged, incomplete or of another "
            f"kind ({error}). Copy or download it again"
        ) from error
    check_format(str(path), metadata)
    try:
        foreign = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
        if foreign:
            dtype = tensors[foreign[0]].dtype
            raise CheckpointError(f"{foreign[0]} has dtype {dtype}, in which no rule computes")
        if metadata.get("sha256") != content_digest(metadata, tensors):
            raise CheckpointError(
                "the file is damaged: its content does not have the digest that its header "
                "states. Copy or download it again"
            )
        if metadata["rule"] not in rule_names():
            raise ValueError(
                f"{unknown_name('update rule', metadata['rule'], rule_names())}. A rule of your "
                f"own: import the module that defines it first (--rules MODULE in the command)"
            )
        with _no_larger_than(tensors):
            rule = build_rule(metadata["rule"], _json_object(metadata, "config"))
        check_fields(rule.config)
        for name, value in rule.config_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        check_weights(rule, tensors)
        # Weights load into the dtype they have: casting them would make another rule.
        for key, entry in rule.state_dict(keep_vars=True).items():
            if key in tensors and entry.is_floating_point():
                entry.data = entry.data.to(tensors[key].dtype)
        rule.load_state_dict(tensors, strict=True)
        for name, value in _json_object(metadata, "use").items():
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if name not in USE or not (is_count or (value is None and name == "trained_steps")):
                raise ValueError(f"its use has {name}={value!r}")
            setattr(rule, name, value)
        record = _json_object(metadata, "record")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path} does not describe a known update rule: {error}") from error
    return rule.eval(), record


def check_format(source: str, header: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` for another library's files and other format versions."""
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{source} is no learned_optim checkpoint: its header says "
            f"format={header.get('format')!r}"
        )
    version = header.get("format_version")
    if str(version) != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{source} has checkpoint format version {version} and this release reads "
            f"{FORMAT_VERSION}: install the release that wrote it"
        )


@contextmanager
def _no_larger_than(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop building a rule once it clearly is larger than the file.

    A configuration can name any size: a million layers would be built for hours, and a million
    units fill the memory, before the weights turned out not to fit.
    """
    stored = sum(tensor.numel() for tensor in tensors.values())
    built, here = 0, threading.get_ident()

    def observe(module: nn.Module, name: str, weight: Tensor | None) -> None:
        nonlocal built
        if weight is None or threading.get_ident() != here:  # the hook is global
            return
        built += weight.numel()
        if built > 10_000 + 4 * stored:  # rules may build parts twice and drop some
            raise CheckpointError(
                f"the configuration in its header is that of a larger rule: the file holds "
                f"{stored:,} numbers"
            )

    hook = register_module_parameter_registration_hook(observe)
    try:
        yield
    finally:
        hook.remove()


def _json_object(metadata: dict[str, str], entry: str) -> dict[str, Any]:
    value = json.loads(metadata[entry])
    if not isinstance(value, dict):
        raise ValueError(f"its {entry} is no JSON object: {metadata[entry][:40]}")
    return value
