"""Loads the library, and says why there is none."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from learned_optim._warn import warn
from learned_optim.kernels import _build

REMEDY = (
    "Build it with `python -m learned_optim.kernels` or reinstall the package, with a C++ compiler "
    f"on the path; {_build.SWITCH}=0 silences this."
)


def load(path: Path | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library and its path; or ``None`` and why it is not used."""
    path = _build.LIBRARY if path is None else path
    if _build.switched_off():
        return None, f"off: {_build.SWITCH}=0"
    if not path.is_file():
        return None, f"missing: {path.name} was not built when the package was installed"
    try:
        library = ctypes.CDLL(str(path))
        library.lo_source.restype = ctypes.c_char_p
        if library.lo_source().decode() != _build.source_hash():
            return None, f"stale: {path.name} was built from other sources"
        library.lo_use_openmp.argtypes = [ctypes.c_void_p]
        library.lo_step.restype = ctypes.c_int32
        library.lo_step.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int32]
        library.lo_lstm_step.restype = ctypes.c_int32
        library.lo_lstm_step.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int32]
    except (OSError, AttributeError) as error:
        return None, f"unusable: {error}"
    return library, f"compiled: {path}"


@functools.cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """What :func:`load` found, once per process."""
    library, where = load()
    if library is not None:
        share_threads(library)
        if hasattr(os, "register_at_fork"):  # a child process has none of OpenMP's threads
            os.register_at_fork(after_in_child=lambda: library.lo_use_openmp(None))
    return library, where


def share_threads(library: ctypes.CDLL) -> None:
    """Let the library use the threads of torch's OpenMP, if that is GNU's."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # another runtime; or Windows
        return
    library.lo_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))


_warned = False


def library() -> ctypes.CDLL | None:
    """The compiled library, or ``None``.

    Warns once per process if it is missing although kernels are enabled.
    """
    global _warned
    found, why = loaded()
    if found is None and not why.startswith("off") and not _warned:
        _warned = True  # before the warning, which may be an error
        warn(
            f"learned_optim runs without its compiled kernel, several times slower ({why}). "
            f"{REMEDY}",
            RuntimeWarning,
        )
    return found
