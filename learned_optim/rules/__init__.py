"""Update rules, one file each, registered by being there."""

from learned_optim.rules._base import (
    RecurrentRule,
    RuleConfig,
    State,
    TensorRule,
    UpdateRule,
    build_rule,
    rule_class,
    rule_for,
    rule_names,
    tensor_of_each,
)
from learned_optim.rules._shards import whole_mean, whole_shape

__all__ = [
    "RecurrentRule",
    "RuleConfig",
    "State",
    "TensorRule",
    "UpdateRule",
    "build_rule",
    "rule_class",
    "rule_for",
    "rule_names",
    "tensor_of_each",
    "whole_mean",
    "whole_shape",
]
