"""The Triton kernels of the rule ``horizon``: what ``step.cpp`` does, on a GPU.

Two launches. :func:`gains_kernel`, one program per tensor: inputs from the statistics of the step
before, the network, gains. :func:`update_kernel`, one program per chunk of a tensor: moments,
parameters and sums; the last chunk of a tensor to finish adds up the sums of all of them, always in
the same order, and writes the statistics. So results do not depend on which one that is.

What is computed per tensor is float64, per coordinate float32, as in ``step.cpp``.
"""

from learned_optim.kernels._triton_common import addresses_kernel
from learned_optim.kernels._triton_gains import gains_kernel
from learned_optim.kernels._triton_update import update_kernel

__all__ = ["addresses_kernel", "gains_kernel", "update_kernel"]
