"""Update rules by name. Importing the module that defines a rule registers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from learned_optim._discovery import import_submodules, unknown_name
from learned_optim.rules import _base
from learned_optim.rules._base import RuleConfig, UpdateRule


def rule_class(name: str) -> type[UpdateRule]:
    """The update rule registered under ``name``.

    Raises:
        ValueError: no rule has that name; the message lists those that exist.
    """
    known = rule_names()
    if name not in known:
        raise unknown_name("update rule", name, known)
    return _base.RULES[name]


def rule_names() -> list[str]:
    """Names of all registered update rules."""
    list(import_submodules("learned_optim.rules"))
    return sorted(_base.RULES)


def rule_for(config: RuleConfig) -> UpdateRule:
    """A rule with fresh weights; the type of the configuration decides which rule.

    Raises:
        TypeError: no rule, or more than one, is configured by this type.
    """
    fitting = [name for name in rule_names() if _base.RULES[name].Config is type(config)]
    if len(fitting) != 1:
        which = f"{', '.join(fitting)} are all" if fitting else "no update rule is"
        raise TypeError(
            f"{which} configured by {type(config).__name__}: give every rule a Config of its own"
        )
    return _base.RULES[fitting[0]](config)


def rule_reference(config: RuleConfig) -> str:
    """Name of a configuration's rule; with its module, if that is outside of this package."""
    cls = type(rule_for(config))
    ours = __name__.partition(".")[0]
    foreign = cls.__module__.partition(".")[0] not in (ours, "__main__")
    return f"{cls.__module__}:{cls.name}" if foreign else cls.name


def build_rule(name: str, config: dict[str, Any]) -> UpdateRule:
    """A rule with fresh float32 weights on the CPU.

    Default dtype, default device and active modes do not matter, and the global random generator
    is not moved.

    Raises:
        ValueError: unknown name, or a configuration with unknown or missing fields.
    """
    cls = rule_class(name)
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        with plain_defaults(), torch.random.fork_rng(devices=[]):
            return cls(cls.Config(**values))
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(cls.Config))
        raise ValueError(
            f"configuration {config} does not fit update rule {name!r} (fields: {fields}): {error}"
        ) from error


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Make new tensors float32 and real on the CPU, whatever surrounds the caller."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    dtype = torch.get_default_dtype()
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
