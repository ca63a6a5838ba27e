"""Identity of a rule: name, configuration, weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, ClassVar

import torch
from torch import nn

from learned_optim._tensors import tensor_bytes


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of every rule's configuration: frozen and JSON-serializable."""


#: Registered rules by name.
RULES: dict[str, Any] = {}


def register(cls: type[ConfiguredModule]) -> None:
    """Register a rule class under its name.

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = RULES.get(cls.name, cls)
    if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"{cls.__qualname__} cannot be named {cls.name!r}: {taken.__qualname__} of "
            f"{taken.__module__} is, and checkpoints know rules by name"
        )
    RULES[cls.name] = cls


class ConfiguredModule(nn.Module):
    """A module that its registered name, a configuration and weights rebuild.

    Args:
        config: of type ``Config``; ``None`` takes the defaults.
    """

    #: Registered name.
    name: ClassVar[str] = ""
    #: Type of the configuration.
    Config: ClassVar[type[RuleConfig]] = RuleConfig

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self._state_keys: tuple[str, ...] | None = None
        self.config: Any = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise TypeError(
                f"{type(self).__name__} takes a {self.Config.__name__}, "
                f"got {type(self.config).__name__}"
            )

    def init_from(self, other: ConfiguredModule) -> None:
        """Take the weights of another rule of the same kind and size.

        Raises:
            ValueError: ``other`` is another kind of rule, or its weights have other shapes.
        """
        own = {name: value.shape for name, value in self.state_dict().items()}
        weights = other.state_dict()
        if type(other) is not type(self) or own != {n: v.shape for n, v in weights.items()}:
            raise ValueError(
                f"a rule {self.name!r} with {self.config} cannot begin with the weights of a rule "
                f"{other.name!r} with {other.config}: they must be of one kind and size"
            )
        self.load_state_dict(weights)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the rule computes in: that of its weights, float32 for a rule without any."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready data."""
        return dataclasses.asdict(self.config)

    def fingerprint(self) -> str:
        """Identity of this rule: 16 hex digits over its name, configuration and weight bits."""
        digest = hashlib.sha256(self.name.encode())
        digest.update(json.dumps(self.config_dict(), sort_keys=True).encode())
        for key, weight in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(weight))
        return digest.hexdigest()[:16]
