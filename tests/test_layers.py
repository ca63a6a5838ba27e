"""Dependencies point one way: what is below meta-training and evaluation never imports them."""

import ast
from pathlib import Path

import pytest

import learned_optim

PACKAGE = Path(learned_optim.__file__).parent

#: From the lowest layer up (docs/design.md); a module may import its own layer and those before it.
LAYERS = (
    (
        "_ambient",
        "_discovery",
        "_extras",
        "_fields",
        "_tensors",
        "_warn",
        "preprocessing",
    ),
    ("kernels",),
    ("rules",),
    ("checkpoint", "summary"),
    ("_card",),
    ("_download", "hub", "pretrained"),
    ("_frozen", "_views"),
    ("_diagnostics", "_group_step", "_groups", "_param_states", "_watch", "optimizer", "trainers"),
    ("meta",),
    ("evaluation",),
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


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file names in imports, those for type checkers included."""
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


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    found: list[set[str]] = []
    for name in sorted(graph):
        members = {other for other in reach[name] if name in reach[other]}
        if members and members not in found:
            found.append(members)
    return found


def test_no_files_import_each_other() -> None:
    modules = {module_of(path) for path in FILES}
    assert circles({module_of(path): file_imports(path, modules) for path in FILES}) == []


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [{"b", "c"}]
