"""The examples, in this process and shorter; the notebook from top to bottom."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"]


def falls(losses: list[float], share: float) -> bool:
    return sum(losses[-5:]) / 5 < share * losses[0]


def test_fine_tuning() -> None:
    found = main_of("fine_tuning")(60)
    assert found["before: original"] > 0.95
    for lr in (1.0, 0.1):
        assert found[f"lr={lr}: shifted"] > found["before: shifted"] + 0.1
    assert found["lr=0.1: original"] > found["lr=1.0: original"]  # forgets less


def test_character_model(capsys: pytest.CaptureFixture[str]) -> None:
    losses = main_of("character_model")(40)
    assert falls(losses, 0.75)
    assert "'The data " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="the example needs Lightning")
    monkeypatch.chdir(tmp_path)
    losses = main_of("with_lightning")(2)
    assert len(losses) == 58
    assert falls(losses, 0.25)


def test_accelerate() -> None:
    pytest.importorskip("accelerate", reason="the example needs Accelerate")
    losses = main_of("with_accelerate")(2)
    assert len(losses) == 58
    assert falls(losses, 0.25)


@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process, with everything but the exchange; two are in tests/compat."""
    torch_fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(torch_fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    # A store that listens already: a port that is merely free now may be taken later.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert falls(main_of("with_fsdp2")(40), 0.3)


def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the notebook draws")
    matplotlib.use("agg")
    notebook = json.loads((FOLDER / "first_steps.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # figures belong to who runs it
            code = "".join(cell["source"])
            exec(compile(code, f"first_steps.ipynb: {cell['id']}", "exec"), namespace)
    runs = namespace["runs"]
    assert {len(losses) for losses in runs.values()} == {200}
    assert falls(runs["LearnedOptimizer"], 0.1)
    assert all(
        numbers["schedule"] < 0.02 for numbers in namespace["optimizer"].diagnostics().values()
    )
    assert "rule of the saved state" in capsys.readouterr().out


def test_search_for_a_meta_learning_rate(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        "task = 'quadratic'\nrule = 'lstm'\nepochs = 9\nmeta_lr = 0.1\nruns_per_epoch = 1\n"
        "horizon = 4\nvalidation_runs = 2\n"
    )
    command = [sys.executable, str(FOLDER / "search_meta_lr.py"), "--recipe", str(recipe)]
    options = ["--trials", "2", "--epochs", "1", "--folder", str(tmp_path / "search")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^best: meta_lr=\S+, validation \S+$", done.stdout, re.M)
    assert (tmp_path / "search" / "1" / "best.safetensors").is_file()
