"""The examples, as a user runs them or shorter; the notebook from top to bottom."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import python

FOLDER = Path(__file__).parent.parent / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"]


def falls(losses: list[float], share: float) -> bool:
    return sum(losses[-5:]) / 5 < share * losses[0]


def test_compare_with_adamw(tmp_path: Path) -> None:
    """Three tables of eight runs, what each says, and four pictures in a folder."""
    output = python(FOLDER / "compare_with_adamw.py", "--steps", "6", folder=tmp_path)
    assert len(re.findall(r"^\| (?:learned optimizer|AdamW, lr \S+) \|", output, re.M)) == 24
    verdicts = re.findall(r"^(\w+): training loss (?:ahead of|behind) that of", output, re.M)
    assert verdicts == ["digits", "table", "text"]
    assert re.search(r"one untuned run equals the best of [\w .]+ AdamW runs", output)
    assert sorted(p.name for p in (tmp_path / "comparison").glob("*.png")) == [
        "digits.png", "table.png", "text.png", "worth.png",
    ]  # fmt: skip


@pytest.mark.slow
def test_thesis(tmp_path: Path) -> None:
    output = python(FOLDER / "thesis.py", "--steps", "30", "--seeds", "2", folder=tmp_path)
    rows = re.findall(r"^\| digits, 30 steps \| \**(\w+)\** .*\| (\S+) ± \S+ \|", output, re.M)
    assert [name for name, _ in rows] == ["mnist", "adam", "sgd"]
    assert float(rows[0][1]) < float(rows[1][1])  # summed, than Adam tuned for it
    assert (tmp_path / "thesis" / "digits.png").is_file()


@pytest.mark.slow
def test_meta_train_your_own(tmp_path: Path) -> None:
    tiny = ("--steps", "12", "--seeds", "2", "--epochs", "1", "--runs-per-epoch", "2")
    output = python(FOLDER / "meta_train_your_own.py", *tiny, folder=tmp_path)
    rows = re.findall(r"^\| network, 12 steps \| \**([\w-]+)\** \| (\S+) \| (\S+) ±", output, re.M)
    assert {name for name, _, _ in rows} == {"my-optimizer", "coordinatewise", "adam", "adamw"}
    assert all(0 < float(final) < 3.5 for _, _, final in rows)
    assert re.search(r"in a training loop of 12 steps: loss \d\.\d{3} over the last ten", output)
    assert (tmp_path / "runs" / "my-optimizer" / "my-optimizer.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_search_for_a_meta_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        "task = 'quadratic'\nrule = 'lstm'\nepochs = 9\nmeta_lr = 0.1\nruns_per_epoch = 1\n"
        "horizon = 4\nvalidation_runs = 2\n"
    )
    options = ("--recipe", "small.toml", "--trials", "2", "--epochs", "1", "--folder", "search")
    output = python(FOLDER / "search_meta_lr.py", *options, folder=tmp_path)
    assert re.search(r"^best: meta_lr=\S+, validation \S+$", output, re.M)
    assert (tmp_path / "search" / "1" / "best.safetensors").is_file()


def test_fine_tuning() -> None:
    found = main_of("fine_tuning")(60)
    before = found.pop("before")
    assert before[1] > 0.95
    assert all(shifted > before[0] + 0.1 for shifted, _ in found.values())
    assert found["learned, lr=0.1"][1] > found["learned, lr=1"][1]  # forgets less


def test_character_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert falls(main_of("character_model")(40), 0.75)
    assert "'The data " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("trainer", ["lightning", "accelerate"])
@pytest.mark.usefixtures("working_folder")
def test_trainers(trainer: str) -> None:
    pytest.importorskip(trainer)
    losses = main_of(f"with_{trainer}")(2)
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


def test_notebook() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the notebook draws")
    matplotlib.use("agg")
    notebook = json.loads((FOLDER / "first_steps.ipynb").read_text())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # figures belong to who runs it
            code = "".join(cell["source"])
            exec(compile(code, f"first_steps.ipynb: {cell['id']}", "exec"), namespace)
    assert falls(namespace["runs"]["LearnedOptimizer"], 0.1)
    diagnostics = namespace["optimizer"].diagnostics()
    assert all(numbers["schedule"] < 0.02 for numbers in diagnostics.values())
