"""Frozen update rules, which optimizers of a process share."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.pretrained import ALIASES, checkpoint_path, load_rule
from learned_optim.rules import UpdateRule
from learned_optim.rules._registry import plain_defaults


class FrozenRule:
    """An update rule, frozen in place, with its copies on other devices."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule.requires_grad_(False).eval()
        assert self.rule.state_keys is not None  # cached now, before any compilation
        self.identity = {"name": rule.name, "fingerprint": rule.fingerprint()}
        self._copies: dict[torch.device, UpdateRule] = {torch.device("cpu"): self.rule}
        self._fake: tuple[object, UpdateRule] | None = None  # of the last fake tensor mode

    def on(self, param: Tensor) -> UpdateRule:
        """The rule on the device of ``param``, copied there at first use."""
        mode: Any = getattr(param, "fake_mode", None)
        if mode is None:
            found = self._copies.get(param.device)
            if found is None:
                with plain_defaults():
                    found = copy.deepcopy(self.rule).to(param.device)
                self._copies[param.device] = found
            return found
        if self._fake is None or self._fake[0] is not mode:
            with plain_defaults():
                rule = copy.deepcopy(self.rule)
            with mode:
                for module in rule.modules():
                    for name, weight in list(module.named_parameters(recurse=False)):
                        fake = torch.empty(weight.shape, dtype=weight.dtype, device=param.device)
                        module.register_parameter(name, nn.Parameter(fake, requires_grad=False))
            self._fake = mode, rule
        return self._fake[1]


_SHARED: dict[tuple[Path, int], FrozenRule] = {}


def freeze(rule: str | os.PathLike[str] | UpdateRule) -> FrozenRule:
    """A copy of a rule, or the shared rule of a checkpoint.

    Raises:
        See :func:`~learned_optim.load_rule`.
    """
    with plain_defaults():
        if isinstance(rule, UpdateRule):
            return FrozenRule(copy.deepcopy(rule))
        path = checkpoint_path(rule)
        key = path, path.stat().st_mtime_ns
        if key not in _SHARED:
            _SHARED[key] = FrozenRule(load_rule(rule))
        return _SHARED[key]


def source_name(rule: str | os.PathLike[str] | UpdateRule) -> str | None:
    """Name of a checkpoint, with its alias; ``None`` for a rule."""
    if isinstance(rule, UpdateRule):
        return None
    text = os.fspath(rule)
    return f"{ALIASES[text]} ({text})" if text in ALIASES else text
