"""The distribution: its files, and that they work on their own."""

import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import python

from learned_optim import list_pretrained, load_rule
from learned_optim.kernels._build import HEADER, LIBRARY, SOURCES, compilers, switched_off
from learned_optim.meta.recipes import recipes

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "pretrained").glob("*.safetensors"))

COMPILES = bool(compilers()) and not switched_off()

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distribution, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content; everything else comes from the environment."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    options = ("--quiet", "--no-deps", "--no-index", "--target", target)
    python("-m", "pip", "install", *options, wheel)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """What Python prints with only the installed package on its path."""
    return python(*arguments, folder=folder, PYTHONPATH=str(installed), HF_HUB_OFFLINE="1")


def test_contents(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
    assert {"learned_optim/optimizer.py", "learned_optim/py.typed"} <= packed
    assert {f"learned_optim/pretrained/{name}.safetensors" for name in SHIPPED} <= packed
    top = {name.split("/")[0] for name in packed}
    assert {t for t in top if not t.endswith(".dist-info")} == {"learned_optim"}
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    library = f"learned_optim/kernels/{LIBRARY.name}"
    assert (library in packed) == (not wheel.name.endswith("-py3-none-any.whl")) == COMPILES
    sources = {f"learned_optim/kernels/{path.name}" for path in (*SOURCES, HEADER)}
    assert sources <= packed
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {f"pretrained/{name}.safetensors" for name in SHIPPED} <= inside
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} <= inside
    assert {"hatch_build.py", *sources} <= inside
    assert library not in inside


def test_the_command_lists_what_ships(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "-m", "learned_optim", "list").splitlines()
    for name in (*SHIPPED, "default", "default-fast", *recipes()):
        assert any(line.startswith(f"  {name} ") for line in shown), name
    version = run(installed, tmp_path, "-m", "learned_optim", "--version").split()[1]
    assert (installed / f"learned_optim-{version}.dist-info").is_dir()
    assert (installed / "bin" / "learned-optim").is_file()


# Runs README's snippet, all checkpoints and commands where only the wheel and the distributions it
# requires can be imported: what `pip install` of the wheel leaves in an empty environment.
CORE = """
import contextlib, importlib.metadata as metadata, io, json, re, sys

def name_of(requirement):
    return re.match(r"[\\w.-]+", requirement).group().lower().replace("_", "-").replace(".", "-")

allowed, waiting = set(), ["learned-optim"]
while waiting:
    name = waiting.pop()
    with contextlib.suppress(metadata.PackageNotFoundError):
        requires = metadata.requires(name) or []
        waiting += [] if name in allowed else [name_of(r) for r in requires if "extra ==" not in r]
        allowed.add(name)
owners = {**metadata.packages_distributions(), "learned_optim": ["learned-optim"]}

class OnlyCore:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in owners and not {name_of(owner) for owner in owners[top]} & allowed:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(OnlyCore, sys.meta_path)
for missing in ("numpy", "scipy", "torchvision", "matplotlib"):
    with contextlib.suppress(ModuleNotFoundError):
        __import__(missing)
        raise AssertionError(f"{missing} is among the core dependencies")

names = {}
exec(sys.argv[1], names)
import learned_optim, torch
from learned_optim import LearnedOptimizer, list_pretrained, load_record, load_rule, save_rule
from learned_optim.cli import main
fingerprints, printed = {}, {}
for name in list_pretrained():
    save_rule(load_rule(name), "copy.safetensors", load_record(name))
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = LearnedOptimizer([param], "copy.safetensors")
    param.grad = torch.ones(5)
    optimizer.step()
    torch.save(optimizer.state_dict(), "state.pt")
    optimizer.load_state_dict(torch.load("state.pt", weights_only=True))
    optimizer.step()
    fingerprints[name] = load_rule("copy.safetensors").fingerprint()
for command in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = main(command.split())
        except SystemExit as end:
            status = end.code
    printed[command] = status, out.getvalue()
print(json.dumps([learned_optim.__file__, names["loss"].item(), fingerprints, printed]))
"""


def test_core_dependencies_are_enough(installed: Path, tmp_path: Path) -> None:
    """README's snippet, saving and loading; commands name the extra that they need."""
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    commands = ("list", "show default", "train quick", "evaluate")
    lines = run(installed, tmp_path, "-c", CORE, snippet[1], *commands).splitlines()
    where, loss, fingerprints, printed = json.loads(lines[-1])
    assert Path(where) == installed / "learned_optim" / "__init__.py"
    assert 0 < loss < 2.5
    assert fingerprints == {name: load_rule(name).fingerprint() for name in list_pretrained()}
    for command, (status, text) in printed.items():
        assert status == 1
        assert re.search(r" needs \w+: install the extra 'meta' \(pip install ", text), command
