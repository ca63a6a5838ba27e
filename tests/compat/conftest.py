"""Every rule and every shipped checkpoint as fixtures; one thread and a fixed seed per test."""

from __future__ import annotations

import pytest
import torch

from learned_optim.rules import UpdateRule

from .common import ALL_RULES, DESCENDING_RULES, make_rule


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=ALL_RULES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return make_rule(request.param)


@pytest.fixture(params=DESCENDING_RULES)
def descending(request: pytest.FixtureRequest) -> UpdateRule:
    return make_rule(request.param)
