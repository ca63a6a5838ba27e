"""Dependencies point one way: what is below meta-training and evaluation never imports them."""

import ast
from pathlib import Path

import pytest

import learned_optim

PACKAGE = Path(learned_optim.__file__).parent

#: From the lowest layer up (docs/design.md); a module may import its own layer and those before it.
LAYERS = (
    ("_bytes", "_discovery", "_fields", "_shapes", "guard", "preprocessing"),
    ("kernels",),
    ("rules",),
    ("checkpoint", "summary"),
    ("_card",),
    ("hub", "pretrained"),
    ("_ambient", "_frozen", "_views"),
    ("_diagnostics", "_group_step", "_groups", "_guarded", "_saved_state", "optimizer"),
    ("meta",),
    ("explain",),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "learned_optim":
            found |= {alias.name for alias in node.names} & set(LEVELS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("learned_optim."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "learned_optim" and parts[1:]}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = LEVELS[layer_of(path)]
    assert {name for name in imports(path) if LEVELS[name] > here} == set()
