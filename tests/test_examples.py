"""The examples, as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from learned_optim.meta.data import DataOptions

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder: Path, *arguments: str, example: str = "train_classifier.py") -> str:
    script = str(EXAMPLES / example)
    command = [sys.executable, script, "--steps", "30", "--seeds", "2", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_digits_in_an_empty_folder(tmp_path: Path) -> None:
    output = run(tmp_path)
    rows = re.findall(r"^(LearnedOptimizer|Adam|SGD)\(.*?\) +(\S+)", output, re.M)
    assert [name for name, _ in rows] == ["LearnedOptimizer", "Adam", "SGD"] * 2
    untrained = 30 * 2.303  # log(10) a step
    assert all(0 < float(summed) < 1.01 * untrained for _, summed in rows)
    assert float(rows[0][1]) < 1.1 * float(rows[1][1])  # level with Adam tuned for it
    assert [path.name for path in tmp_path.iterdir()] == ["train_classifier.png"]
    with Image.open(tmp_path / "train_classifier.png") as image:
        assert image.size == (1320, 540)


@pytest.mark.slow
def test_mnist(tmp_path: Path, image_data: DataOptions) -> None:
    output = run(tmp_path, "--dataset", "mnist", "--data-dir", str(image_data.root()))
    assert "mnist, 30 steps, mean of 2 seeds" in output


@pytest.mark.slow
def test_meta_train_your_own(tmp_path: Path) -> None:
    tiny = ("--steps", "12", "--epochs", "1", "--runs-per-epoch", "2")
    output = run(tmp_path, *tiny, example="meta_train_your_own.py")
    rows = re.findall(r"^\| network \| (\S+).*? \| (\S+) \| (\S+) ±", output, re.M)
    assert {name for name, _, _ in rows} == {"my-optimizer", "coordinatewise", "adam", "adamw"}
    assert all(0 < float(summed) < 12 * 3.5 for _, _, summed in rows)
    assert re.search(r"in a training loop of 12 steps: loss \d\.\d{3} over the last ten", output)
    assert (tmp_path / "runs" / "my-optimizer" / "my-optimizer.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
