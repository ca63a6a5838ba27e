"""Build hook: compiles the kernels into the wheel, or says why the wheel goes without."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelBuildHook(BuildHookInterface[Any]):
    """With a library the wheel is one of this platform, for any Python 3; without, a pure one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = _build_module(Path(self.root))
        if kernels.switched_off():
            self.app.display_info(f"{kernels.SWITCH}=0: built without the compiled kernels")
            return
        try:
            compiler = kernels.build()
        except (kernels.BuildError, OSError) as error:
            self.app.display_warning(
                f"Built without the compiled kernels, steps will be several times slower: {error}"
            )
            return
        self.app.display_info(f"Compiled {kernels.LIBRARY.name} with {compiler}")
        if version == "editable":  # the library lies beside its source
            return
        # Not tracked by git, so it has to be named.
        library = kernels.LIBRARY.relative_to(self.root).as_posix()
        build_data["artifacts"].append(f"/{library}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _build_module(root: Path) -> ModuleType:
    """The package's own builder, loaded without the package, which needs torch."""
    path = root / "learned_optim" / "kernels" / "_build.py"
    spec = importlib.util.spec_from_file_location("_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """This platform's own tag: nobody checked the library against manylinux."""
    tags = (tag.platform for tag in sys_tags())
    return next(tag for tag in tags if not tag.startswith(("manylinux", "musllinux")))
