"""The distribution: what is in the files that get installed, and that they work on their own."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from learned_optim.meta.recipes import recipes

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "pretrained").glob("*.safetensors"))

pytestmark = pytest.mark.slow


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
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {f"pretrained/{name}.safetensors" for name in SHIPPED} <= inside
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} <= inside


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
    assert f"recipes: {', '.join(sorted(recipes()))}\n" in listed
    assert (installed / "bin" / "learned-optim").is_file()


TRAIN = """
import sys, torch
from learned_optim import LearnedOptimizer, load_record
from torch.nn.functional import cross_entropy
torch.manual_seed(0)
name = sys.argv[1]
if load_record(name)["recipe"]["task"] == "quadratic":
    params = [torch.nn.Parameter(torch.zeros(3))]
    target = torch.tensor([1.0, -0.5, 0.25])
    compute = lambda: (params[0] - target).square().sum()
else:
    x = torch.rand(128, 20)
    y = (x[:, :5].sum(1) > 2.5).long()
    shapes = [(20, 20), (20,), (20, 2), (2,)]
    params = [torch.nn.Parameter(0.001 * torch.randn(shape)) for shape in shapes]
    w1, b1, w2, b2 = params
    compute = lambda: cross_entropy((x @ w1 + b1).sigmoid() @ w2 + b2, y)
optimizer = LearnedOptimizer(params, name)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = compute()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses[0], losses[-1])
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint_optimizes(name: str, installed: Path, tmp_path: Path) -> None:
    """From an empty folder, on a small problem of the kind the rule was trained for."""
    first, last = map(float, python(installed, tmp_path, "-c", TRAIN, name).split())
    assert first == pytest.approx(1.3125 if name == "quadratic" else 0.693, abs=0.01)
    assert last < 0.2 * first
