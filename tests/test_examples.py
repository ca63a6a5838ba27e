"""The examples, as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from learned_optim.meta.data import DataOptions

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder: Path, *arguments: str, example: str = "thesis.py") -> str:
    script = str(EXAMPLES / example)
    command = [sys.executable, script, "--steps", "30", "--seeds", "2", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compare_with_adamw(tmp_path: Path) -> None:
    """Three tables of eight runs, what each says, and four pictures in a folder."""
    script = str(EXAMPLES / "compare_with_adamw.py")
    done = subprocess.run(
        [sys.executable, script, "--steps", "6"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| (?:learned optimizer|AdamW, lr \S+) \|", done.stdout, re.M)) == 24
    verdicts = re.findall(r"^(\w+): training loss (?:ahead of|behind) that of", done.stdout, re.M)
    assert verdicts == ["digits", "table", "text"]
    assert re.search(r"one untuned run equals the best of [\w .]+ AdamW runs", done.stdout)
    assert sorted(p.name for p in (tmp_path / "comparison").glob("*.png")) == [
        "digits.png", "table.png", "text.png", "worth.png",
    ]  # fmt: skip


@pytest.mark.slow
def test_thesis_in_an_empty_folder(tmp_path: Path) -> None:
    output = run(tmp_path)
    rows = re.findall(r"^(LearnedOptimizer|Adam|SGD)\(.*?\) +(\S+)", output, re.M)
    assert [name for name, _ in rows] == ["LearnedOptimizer", "Adam", "SGD"]
    assert float(rows[0][1]) < float(rows[1][1])  # than Adam tuned for it
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.png"]


@pytest.mark.slow
def test_mnist(tmp_path: Path, image_data: DataOptions) -> None:
    output = run(tmp_path, "--dataset", "mnist", "--data-dir", str(image_data.root()))
    assert "mnist, 30 steps, mean of 2 seeds" in output


@pytest.mark.slow
def test_meta_train_your_own(tmp_path: Path) -> None:
    tiny = ("--steps", "12", "--epochs", "1", "--runs-per-epoch", "2")
    output = run(tmp_path, *tiny, example="meta_train_your_own.py")
    rows = re.findall(r"^\| network, 12 steps \| \**([\w-]+)\** \| (\S+) \| (\S+) ±", output, re.M)
    assert {name for name, _, _ in rows} == {"my-optimizer", "coordinatewise", "adam", "adamw"}
    assert all(0 < float(final) < 3.5 for _, _, final in rows)
    assert re.search(r"in a training loop of 12 steps: loss \d\.\d{3} over the last ten", output)
    assert (tmp_path / "runs" / "my-optimizer" / "my-optimizer.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
