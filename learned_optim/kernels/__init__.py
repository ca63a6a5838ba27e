"""Compiled steps, of the rule ``horizon`` and of stacks of LSTM layers.

On the CPU a library in plain C behind ctypes, built when the package is installed with a C++
compiler at hand; on a GPU kernels in Triton for ``horizon``, which come with torch there. Where
they are missing, or tensors do not suit them, callers use the pure form, which they equal up to
rounding. ``status()`` says whether they are used; ``LEARNED_OPTIM_KERNELS=0`` in the environment
switches them off.
"""

from learned_optim.kernels import _library, triton_step
from learned_optim.kernels._lstm import lstm_step_
from learned_optim.kernels._step import bind, step_


def status(device_type: str = "cpu") -> str:
    """Whether the kernel for ``"cpu"`` or ``"cuda"`` tensors is used and, if not, why not."""
    if device_type == "cpu":
        return _library.loaded()[1]
    if device_type == "cuda":
        return triton_step.loaded()[1]
    return f"missing: no kernel for {device_type!r}"


__all__ = ["bind", "lstm_step_", "status", "step_"]
