"""Optimizers that are learned: a drop-in replacement for torch.optim."""

__version__ = "0.1.0"
