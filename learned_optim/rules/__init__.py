"""Update rules, one file each, registered by being there."""

from learned_optim.rules._base import State, StepContext, UpdateRule
from learned_optim.rules._config import RuleConfig
from learned_optim.rules._registry import (
    build_rule,
    rule_class,
    rule_for,
    rule_names,
    rule_reference,
)
from learned_optim.rules._segments import Segments

__all__ = [
    "RuleConfig",
    "Segments",
    "State",
    "StepContext",
    "UpdateRule",
    "build_rule",
    "rule_class",
    "rule_for",
    "rule_names",
    "rule_reference",
]
