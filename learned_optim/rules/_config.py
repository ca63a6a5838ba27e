"""What identifies a rule: its name, its configuration and its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learned_optim._bytes import tensor_bytes

#: Metadata of a field that a configuration gained after rules had been published. Its default does
#: what was done before, and leaves the fingerprints of these rules as they were.
ADDED = {"added": True}


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Base of every rule's configuration: frozen and JSON-serializable."""


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
        """Begin with the weights of another rule of this kind; those it lacks stay as they are.

        Where :meth:`_widen` says how, ``other`` may have fewer units: the rule then computes the
        same function, until training connects the new units.

        Raises:
            ValueError: ``other`` is another kind of rule, or has weights that fit nowhere.
        """
        own, misfits = self.state_dict(), []
        for name, value in other.state_dict().items():
            if name in own and own[name].shape != value.shape:
                value = self._widen(name, own[name], value)
            if name not in own or value is None:
                misfits.append(name)
            else:
                own[name] = value
        if type(other) is not type(self) or misfits:
            raise ValueError(
                f"a rule {self.name!r} with {self.config} cannot begin with the weights of a rule "
                f"{other.name!r} with {other.config}: it has no place for "
                f"{', '.join(misfits) or 'them'}"
            )
        self.load_state_dict(own)

    def _widen(self, name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
        """``own`` with the weights of fewer units in their places, or ``None`` if it has none."""
        return None

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
        config = self.config_dict()
        for field in dataclasses.fields(self.config):
            if field.metadata == ADDED and config[field.name] == field.default:
                del config[field.name]
        digest.update(json.dumps(config, sort_keys=True).encode())
        for key, weight in sorted(self.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(weight))
        return digest.hexdigest()[:16]
