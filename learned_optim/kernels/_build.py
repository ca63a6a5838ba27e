"""Builds the library from its sources. Standard library alone: the build hook runs it, too."""

from __future__ import annotations

import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: "0" builds and uses no library.
SWITCH = "LEARNED_OPTIM_KERNELS"
FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "step.cpp", FOLDER / "lstm.cpp")
HEADER = FOLDER / "library.h"
CONSTANTS = FOLDER / "constants.py"
LIBRARY = FOLDER / f"libstep{ {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so') }"

_WARNINGS = ["-Wall", "-Wextra"]
# Flags that let loops with roots and conditions become vector code. Unlike -ffast-math they keep
# NaN, and the rounding mode of the process.
_MATH = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
_UNIX = ["-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
# Tried in turn: a compiler may lack the pragma, vector types or clones of functions.
_CHOICES = (
    ["-fopenmp-simd"],
    ["-fopenmp-simd", "-DLO_NO_VECTORS"],
    ["-DLO_NO_VECTORS", "-DLO_NO_CLONES"],
)


class BuildError(Exception):
    """The library could not be built."""


def switched_off() -> bool:
    """True if the environment switches kernels off."""
    return os.environ.get(SWITCH, "1") == "0"


def source_hash() -> str:
    """Hash of the sources, which the library reports."""
    digest = hashlib.sha256()
    for path in (*SOURCES, HEADER, CONSTANTS):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def macros() -> list[str]:
    """The constants as definitions; the package itself, which needs torch, is not imported."""
    constants = runpy.run_path(str(CONSTANTS))
    return [f"-DLO_{name}={value!r}" for name, value in constants.items() if name.isupper()]


def compilers() -> list[list[str]]:
    """Commands of C++ compilers at hand, the environment's choice ``CXX`` first."""
    chosen = shlex.split(os.environ.get("CXX", ""), posix=os.name != "nt")
    names = [chosen] if chosen else [["c++"], ["g++"], ["clang++"], ["cl"]]
    return [name for name in names if shutil.which(name[0])]


def command(compiler: list[str], choice: list[str], target: Path) -> list[str]:
    """The command that builds ``target``."""
    defined = [f'-DLO_SOURCE="{source_hash()}"', *macros()]
    sources = [str(source) for source in SOURCES]
    if Path(compiler[0]).stem.lower() == "cl":
        output = [f"/Fe{target}", f"/Fo{target.parent}{os.sep}"]
        flags = ["/nologo", "/O2", "/EHsc", "/std:c++17", "/LD"]
        return [*compiler, *flags, *defined, *sources, *output]
    architectures = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
    flags = [*_UNIX, *_MATH, *_WARNINGS, *choice, *architectures, *defined]
    return [*compiler, *flags, *sources, "-o", str(target)]


def build(library: Path = LIBRARY) -> str:
    """Compile the sources into ``library``, and return the compiler that did it.

    Raises:
        BuildError: there is no compiler, or all of them failed.
    """
    found = compilers()
    if not found:
        raise BuildError("no C++ compiler on the path (c++, g++, clang++, cl, or $CXX)")
    failure = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        target = Path(folder) / library.name
        for compiler in found:
            for choice in _CHOICES:
                line = command(compiler, choice, target)
                done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
                if done.returncode == 0 and target.is_file():
                    # Atomic: a process that starts meanwhile loads the old or the new library.
                    target.replace(library)
                    return compiler[0]
                output = (done.stderr or done.stdout)[-2000:]
                failure = failure or f"{shlex.join(compiler)}: {output}"
    raise BuildError(f"no compiler could build the library: {failure}")
