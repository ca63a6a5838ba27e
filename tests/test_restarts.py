"""Elastic restarts: torchrun starts a training anew whose rank died, and it goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import SMALL

import learned_optim
from learned_optim.meta import MetaTrainer

# Rank 1 kills itself in the middle of the second epoch of the first attempt.
DYING = """
import os, signal, sys
from pathlib import Path
from learned_optim.cli import main
from learned_optim.meta import MetaTrainer

train_run, died = MetaTrainer._train_run, Path(sys.argv[3])

def dying(self, epoch, run):
    if self.rank == 1 and (epoch, run) == (2, 1) and not died.exists():
        died.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return train_run(self, epoch, run)

MetaTrainer._train_run = dying
sys.exit(main(["train", sys.argv[1], "--folder", sys.argv[2]]))
"""


@pytest.mark.slow
def test_a_dead_rank_is_started_again(tmp_path: Path) -> None:
    """From the last epoch, with the weights of a run in which nobody died."""
    recipe = replace(SMALL, epochs=3, coordinates=None)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (tmp_path / "rank.py").write_text(DYING)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=2", str(tmp_path / "rank.py"), str(tmp_path / "recipe.json"),
         str(tmp_path / "two"), str(tmp_path / "died")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert (tmp_path / "died").exists()
    assert "exitcode: -9" in launched.stderr
    one, two = (MetaTrainer(recipe, tmp_path / folder) for folder in ("one", "two"))
    one.train()
    assert two.epoch == 3
    for a, b in zip(two.kept.parameters(), one.kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
