"""The compiled CPU step of the rule ``horizon``; ``status()`` says whether it is used.

The library is plain C behind ctypes, built from ``step.cpp`` when the package is installed with a
C++ compiler at hand. Where it is missing, or tensors do not suit it, callers use the pure form,
which it equals up to rounding. ``LEARNED_OPTIM_KERNELS=0`` in the environment switches it off.
"""

from learned_optim.kernels._library import status
from learned_optim.kernels._step import step_

__all__ = ["status", "step_"]
