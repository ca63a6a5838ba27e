"""Update rules, one file each, registered by being there."""

from learned_optim.kernels import StepSettings
from learned_optim.rules._base import RuleConfig, UpdateRule
from learned_optim.rules._registry import (
    build_rule,
    rule_class,
    rule_for,
    rule_names,
    rule_reference,
)
from learned_optim.rules._segments import Segments
from learned_optim.rules._step import Shards, State, StepContext

__all__ = [
    "RuleConfig",
    "Segments",
    "Shards",
    "State",
    "StepContext",
    "StepSettings",
    "UpdateRule",
    "build_rule",
    "rule_class",
    "rule_for",
    "rule_names",
    "rule_reference",
]
