"""Trains with every checkpoint of an installed wheel, compiled and in plain PyTorch, and compares.

python check_wheel.py    # in an empty folder, by the interpreter of the wheel's environment
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import learned_optim
from learned_optim import LearnedOptimizer, kernels, list_pretrained


def losses(name: str) -> list[float]:
    """Returns the losses of 20 steps on a small classification."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    )  # fmt: skip
    x = torch.randn(128, 20)
    y = (x[:, :5].sum(1) > 0).long()
    optimizer = LearnedOptimizer(model.parameters(), name)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    """Prints the first and last loss of every checkpoint, and fails if the two forms differ."""
    found = {name: losses(name) for name in list_pretrained()}
    if sys.argv[1:] == ["--json"]:
        print(json.dumps({"status": kernels.status(), "losses": found}))
        return
    assert Path(learned_optim.__file__).is_relative_to(sys.prefix), learned_optim.__file__
    assert kernels.status().startswith("compiled"), kernels.status()
    environment = {**os.environ, "LEARNED_OPTIM_KERNELS": "0"}
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    pure = json.loads(done.stdout)
    assert pure["status"].startswith("off"), pure["status"]
    for name, compiled in found.items():
        print(f"{name}: {compiled[0]:.3f} to {compiled[-1]:.3f}")
        assert compiled[-1] < compiled[0], name
        # Rounding grows from step to step, fastest where steps are large.
        torch.testing.assert_close(compiled[:5], pure["losses"][name][:5], rtol=1e-3, atol=1e-4)


main()
