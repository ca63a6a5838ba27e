"""What an update rule has learned: reports with plots, and words computed from numbers.

Needs the ``meta`` extra. The command is ``learned-optim explain CHECKPOINT``.
"""

from learned_optim.explain._ablation import Ablation, Change, ablate
from learned_optim.explain._dependence import Dependence, Response, dependence, responses
from learned_optim.explain._histories import Curve, curves
from learned_optim.explain._report import explain
from learned_optim.explain._runs import Watched, watch_digits

__all__ = [
    "Ablation",
    "Change",
    "Curve",
    "Dependence",
    "Response",
    "Watched",
    "ablate",
    "curves",
    "dependence",
    "explain",
    "responses",
    "watch_digits",
]
