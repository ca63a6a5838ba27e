"""Update rules, one file each, registered by being there."""

from learned_optim.rules._base import (
    RecurrentRule,
    RuleConfig,
    State,
    UpdateRule,
    build_rule,
    rule_class,
    rule_for,
    rule_names,
)

__all__ = [
    "RecurrentRule",
    "RuleConfig",
    "State",
    "UpdateRule",
    "build_rule",
    "rule_class",
    "rule_for",
    "rule_names",
]
