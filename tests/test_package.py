"""The distribution: its files, and that they work on their own."""

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


TRAIN = """
import sys, torch
import learned_optim.cli
from learned_optim import LearnedOptimizer, list_pretrained, load_record
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

print(learned_optim.__file__, learned_optim.__version__, *list_pretrained())
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
learned_optim.cli.main(["list"])
"""


def test_shipped_checkpoints_are_listed_and_optimize(installed: Path, tmp_path: Path) -> None:
    """From an empty folder, on small problems of the kinds the rules were trained for."""
    printed = python(installed, tmp_path, "-c", TRAIN, *SHIPPED).splitlines()
    (where, version, *names), lines = printed[0].split(), printed[1 : 1 + len(SHIPPED)]
    assert Path(where) == installed / "learned_optim" / "__init__.py"
    assert set(names) == {*SHIPPED, "default", "default-fast"}
    (metadata,) = installed.glob("learned_optim-*.dist-info")
    assert metadata.name == f"learned_optim-{version}.dist-info"
    for name, line in zip(SHIPPED, lines, strict=True):
        trained, first, last = line.split()
        assert trained == name
        assert float(first) == pytest.approx(1.3125 if name == "quadratic" else 0.693, abs=0.01)
        assert float(last) < 0.2 * float(first), name
    assert all(any(line.startswith(f"  {name} ") for line in printed) for name in recipes())
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
import torch
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
print(json.dumps([names["loss"].item(), fingerprints, printed]))
"""


def test_core_dependencies_are_enough(installed: Path, tmp_path: Path) -> None:
    """README's snippet, saving and loading; commands name the extra that they need."""
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert snippet is not None
    commands = ("list", "show default", "train quick", "evaluate")
    lines = python(installed, tmp_path, "-c", CORE, snippet[1], *commands).splitlines()
    loss, fingerprints, printed = json.loads(lines[-1])
    assert 0 < loss < 2.5
    assert fingerprints == {name: load_rule(name).fingerprint() for name in list_pretrained()}
    for command, (status, text) in printed.items():
        assert status == 1
        assert re.search(r" needs \w+: install the extra 'meta' \(pip install ", text), command
