"""What an update rule has learned: a report with plots, and words computed from numbers.

Needs the extra ``meta``. The command is ``learned-optim explain CHECKPOINT``.
"""

from learned_optim.explain._report import explain

__all__ = ["explain"]
