"""Every rule and every shipped checkpoint as fixtures."""

import pytest

from learned_optim.rules import UpdateRule

from .common import ALL_RULES, DESCENDING_RULES, make_rule


@pytest.fixture(params=ALL_RULES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return make_rule(request.param)


@pytest.fixture(params=DESCENDING_RULES)
def descending(request: pytest.FixtureRequest) -> UpdateRule:
    return make_rule(request.param)
