"""Reports on what an update rule has learned. Needs the extra ``meta``."""

from learned_optim.explain._report import explain

__all__ = ["explain"]
