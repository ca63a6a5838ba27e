"""Dependencies point one way: what is below meta-training and evaluation never imports them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import learned_optim

PACKAGE = Path(learned_optim.__file__).parent

#: From the lowest layer up (docs/design.md); a module may import its own layer and those before it.
LAYERS = (
    ("_ambient", "_discovery", "_extras", "_fields", "_progress", "_tensors", "_warn"),
    ("kernels",),
    ("rules",),
    ("checkpoint", "summary"),
    ("hub", "pretrained"),
    ("_frozen", "_owners", "_views"),
    ("_diagnostics", "_group_step", "_groups", "_param_states", "_watch", "optimizer", "trainers"),
    ("meta",),
    ("evaluation",),
    ("explain",),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("learned_optim"):
            base = (node.module or "").removeprefix("learned_optim").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in modules else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("learned_optim.") for alias in node.names}
    # A package's `__init__` gathers its modules: what it names there is no circle.
    here = module_of(path)
    return {name for name in found & modules if name and not here.startswith(f"{name}.")}


MODULES = {module_of(path) for path in FILES}
GRAPH = {module_of(path): imports(path, MODULES) for path in FILES}


def test_imports_point_down() -> None:
    def level(module: str) -> int:
        return LEVELS[module.partition(".")[0]]

    up = [(m, n) for m, names in GRAPH.items() for n in names if level(n) > level(m)]
    assert len(GRAPH) > 100
    assert up == []


def test_no_files_import_each_other() -> None:
    """``prepare`` raises an error that names a circle."""
    TopologicalSorter(GRAPH).prepare()
