"""Learned optimizers: update rules trained by gradient descent, used like ``torch.optim``."""

from learned_optim.checkpoint import CheckpointError, save_rule
from learned_optim.guard import Guard
from learned_optim.hub import model_card, push_to_hub
from learned_optim.optimizer import LearnedOptimizer
from learned_optim.pretrained import list_pretrained, load_record, load_rule
from learned_optim.rules import UpdateRule

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Guard",
    "LearnedOptimizer",
    "UpdateRule",
    "__version__",
    "list_pretrained",
    "load_record",
    "load_rule",
    "model_card",
    "push_to_hub",
    "save_rule",
]
