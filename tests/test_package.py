"""The distribution: what is in the files that get installed, and that they work on their own."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content; everything else comes from the environment."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--target", str(target), str(wheel)],
        check=True,
    )  # fmt: skip
    return target


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """What Python prints in ``folder`` with only the installed package on its path."""
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_checkpoints_to_ship() -> None:
    assert {"mnist", "quadratic"} <= set(SHIPPED)


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


def test_lists_the_shipped_checkpoints(installed: Path, tmp_path: Path) -> None:
    code = (
        "import learned_optim as l; print(l.__file__); print(*l.list_pretrained()); "
        "print(l.__version__)"
    )
    where, names, version = python(installed, tmp_path, "-c", code).splitlines()
    assert Path(where) == installed / "learned_optim" / "__init__.py"
    assert set(SHIPPED) == set(names.split()) - {"default", "default-fast"}
    (metadata,) = installed.glob("learned_optim-*.dist-info")
    assert metadata.name == f"learned_optim-{version}.dist-info"
    listed = python(installed, tmp_path, "-m", "learned_optim.cli", "list")
    assert all(f"\n  {name} " in listed for name in recipes())
    assert (installed / "bin" / "learned-optim").is_file()


TRAIN = """
import sys, torch
from learned_optim import LearnedOptimizer, load_record
from torch.nn.functional import cross_entropy

def problem(name):
    torch.manual_seed(0)
    if load_record(name)["recipe"]["task"] == "quadratic":
        params = [torch.nn.Parameter(torch.zeros(3))]
        target = torch.tensor([1.0, -0.5, 0.25])
        return params, lambda: (params[0] - target).square().sum()
    x = torch.rand(128, 20)
    y = (x[:, :5].sum(1) > 2.5).long()
    shapes = [(20, 20), (20,), (20, 2), (2,)]
    params = w1, b1, w2, b2 = [torch.nn.Parameter(0.001 * torch.randn(shape)) for shape in shapes]
    return params, lambda: cross_entropy((x @ w1 + b1).sigmoid() @ w2 + b2, y)

for name in sys.argv[1:]:
    params, compute = problem(name)
    optimizer = LearnedOptimizer(params, name)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = compute()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(name, losses[0], losses[-1])
"""


def test_shipped_checkpoints_optimize(installed: Path, tmp_path: Path) -> None:
    """From an empty folder, on small problems of the kinds the rules were trained for."""
    lines = python(installed, tmp_path, "-c", TRAIN, *SHIPPED).splitlines()
    found = {name: (float(first), float(last)) for name, first, last in map(str.split, lines)}
    assert list(found) == SHIPPED
    for name, (first, last) in found.items():
        assert first == pytest.approx(1.3125 if name == "quadratic" else 0.693, abs=0.01), name
        assert last < 0.2 * first, name


# Runs a program in which only the wheel and the distributions it requires can be imported: what
# `pip install` of the wheel alone leaves in an empty environment.
CORE = """
import importlib.metadata as metadata, re, sys

def name_of(requirement):
    return re.match(r"[\\w.-]+", requirement).group().lower().replace("_", "-").replace(".", "-")

def closure(roots):
    found, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [name_of(r) for r in requires if "extra ==" not in r]
    return found

allowed = closure(["learned-optim"])
owners = metadata.packages_distributions()
owners["learned_optim"] = ["learned-optim"]

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
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{missing} is among the core dependencies")
"""


def core(installed: Path, folder: Path, program: str, *arguments: str) -> str:
    """What a program prints where only the wheel and its core dependencies are installed."""
    return python(installed, folder, "-c", CORE + program, *arguments)


def test_core_dependencies_run_the_readme(installed: Path, tmp_path: Path) -> None:
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert snippet is not None
    program = snippet[1] + "\nprint(loss.item())\n"
    assert 0 < float(core(installed, tmp_path, program).split()[-1]) < 2.5


SAVE_AND_LOAD = """
import sys, torch
from learned_optim import LearnedOptimizer, list_pretrained, load_record, load_rule, save_rule
for name in list_pretrained():
    save_rule(load_rule(name), "copy.safetensors", load_record(name))
    assert load_rule("copy.safetensors").fingerprint() == load_rule(name).fingerprint()
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = LearnedOptimizer([param], "copy.safetensors")
    param.grad = torch.ones(5)
    optimizer.step()
    torch.save(optimizer.state_dict(), "state.pt")
    optimizer.load_state_dict(torch.load("state.pt", weights_only=True))
    optimizer.step()
    print(name, load_rule(name).fingerprint())
"""


def test_core_dependencies_save_and_load(installed: Path, tmp_path: Path) -> None:
    lines = core(installed, tmp_path, SAVE_AND_LOAD).splitlines()
    assert dict(line.split() for line in lines) == {
        name: load_rule(name).fingerprint() for name in list_pretrained()
    }


#: Commands of an installation without extras.
COMMANDS = ("list", "show default", "train quick", "evaluate")
RUN_COMMANDS = """
import contextlib, io, json
from learned_optim.cli import main
printed = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = main(command.split())
        except SystemExit as end:
            status = end.code
    printed[command] = status, out.getvalue()
print(json.dumps(printed))
"""


def test_commands_name_the_extra_that_they_need(installed: Path, tmp_path: Path) -> None:
    printed = json.loads(core(installed, tmp_path, RUN_COMMANDS, *COMMANDS).splitlines()[-1])
    for command in COMMANDS:
        status, text = printed[command]
        assert status == 1
        assert re.search(r" needs \w+: install the extra 'meta' \(pip install ", text), command
