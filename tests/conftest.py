"""Shared fixtures: one thread, fixed seeds, and the data folder where there is one."""

import os
from pathlib import Path

import pytest
import torch

from learned_optim.meta.data import DATA_VARIABLE, DataOptions
from learned_optim.rules import RuleConfig, UpdateRule, rule_class
from learned_optim.rules.equivariant import EquivariantConfig
from learned_optim.rules.steered import SteeredConfig

# One thread here and in the processes that tests start: two of them spin where both cores are busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def image_data() -> DataOptions:
    """The real image sets; tests that ask for them are skipped where there are none."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "MNIST").is_dir():
        pytest.skip(f"needs MNIST and others in the folder that ${DATA_VARIABLE} names")
    return DataOptions(Path(folder), download=False)


WITH_EVERY_PART: dict[str, RuleConfig] = {
    "equivariant": EquivariantConfig(direct=True),
    "steered": SteeredConfig(direct=True),
}


def random_rule(name: str, dtype: torch.dtype = torch.float32) -> UpdateRule:
    """A registered rule with seeded weights, large enough to make every part of it matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        rule = rule_class(name)(WITH_EVERY_PART.get(name)).to(dtype)
        with torch.no_grad():
            for weight in rule.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return rule
