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
from learned_optim.rules._shards import whole_mean, whole_shape

__all__ = [
    "RecurrentRule",
    "RuleConfig",
    "State",
    "UpdateRule",
    "build_rule",
    "rule_class",
    "rule_for",
    "rule_names",
    "whole_mean",
    "whole_shape",
]
