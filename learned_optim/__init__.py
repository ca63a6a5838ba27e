"""Learned optimizers: meta-trained update rules, used like ``torch.optim``."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from learned_optim.checkpoint import CheckpointError, save_rule
    from learned_optim.hub import model_card, push_to_hub
    from learned_optim.optimizer import LearnedOptimizer
    from learned_optim.pretrained import list_pretrained, load_record, load_rule
    from learned_optim.rules import UpdateRule
    from learned_optim.trainers import trainer_callback

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LearnedOptimizer",
    "UpdateRule",
    "__version__",
    "list_pretrained",
    "load_record",
    "load_rule",
    "model_card",
    "push_to_hub",
    "save_rule",
    "trainer_callback",
]

#: Modules of the public names, imported when first used: the command answers ``--help`` at once
#: and can be interrupted while torch is imported.
_HOMES = {
    "CheckpointError": "checkpoint",
    "LearnedOptimizer": "optimizer",
    "UpdateRule": "rules",
    "list_pretrained": "pretrained",
    "load_record": "pretrained",
    "load_rule": "pretrained",
    "model_card": "hub",
    "push_to_hub": "hub",
    "save_rule": "checkpoint",
    "trainer_callback": "trainers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
