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

# torchrun's agent, with ranks that are forked: each would import torch for seconds. Rank 1 kills
# itself in the middle of the second epoch of the first attempt.
LAUNCH = """
import os, signal, sys
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from learned_optim.cli import main
from learned_optim.meta.unrolls import Unrolls

train_run, died = Unrolls.train_run, Path(sys.argv[3])

def dying(self, optimizer, epoch, run):
    if self.rank == 1 and (epoch, run) == (2, 1) and not died.exists():
        died.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return train_run(self, optimizer, epoch, run)

Unrolls.train_run = dying
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="restarts", rdzv_backend="c10d",
    rdzv_endpoint="localhost:0", max_restarts=1, start_method="fork",
)
statuses = elastic_launch(config, main)(["train", sys.argv[1], "--folder", sys.argv[2]])
sys.exit(0 if statuses == {0: 0, 1: 0} else str(statuses))
"""


@pytest.mark.slow
def test_a_dead_rank_is_started_again(tmp_path: Path) -> None:
    """From the last epoch, with the weights of a run in which nobody died."""
    recipe = replace(SMALL, epochs=3, coordinates=None)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (tmp_path / "launch.py").write_text(LAUNCH)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(learned_optim.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    launched = subprocess.run(
        [sys.executable, str(tmp_path / "launch.py"), str(tmp_path / "recipe.json"),
         str(tmp_path / "two"), str(tmp_path / "died")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert (tmp_path / "died").exists()
    one, two = (MetaTrainer(recipe, tmp_path / folder) for folder in ("one", "two"))
    one.train()
    assert two.round == 3
    for a, b in zip(two.kept.parameters(), one.kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
