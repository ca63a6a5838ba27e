"""The step of a stack of LSTM layers on the CPU: one call of the compiled library."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from learned_optim.kernels import _cpu
from learned_optim.kernels._library import library


def lstm_step_(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor], layers: int
) -> bool:
    """One step of a stack of LSTM layers in place; false, and nothing done, if refused.

    Args:
        x: features of ``n`` rows, ``(n, inputs)``, float32, any strides.
        hidden: hidden states of all layers side by side, ``(n, layers * units)``, float32, whose
            rows or columns do not interleave in memory. Fastest with contiguous columns.
        cell: cell states, in the same form.
        weights: ``weight_ih, weight_hh, bias_ih, bias_hh`` of each layer, as ``nn.LSTM`` has them.
        layers: number of layers.
    """
    if _cpu.under_a_mode() or not x.is_cpu:
        return False
    states, rows, units = (x, hidden, cell), len(x), weights[1].shape[-1]
    every = (*states, *weights)
    if not _cpu.are_plain(every) or any(map(Tensor.is_neg, states)):
        return False
    if not all(t.is_cpu and t.dtype is torch.float32 and t.layout is torch.strided for t in every):
        return False
    if any(map(Tensor.is_inference, (hidden, cell))) and not torch.is_inference_mode_enabled():
        return False
    inputs = [x.shape[-1], *[units] * (layers - 1)]
    shapes = [
        shape
        for wide in inputs
        for shape in ((4 * units, wide), (4 * units, units), (4 * units,), (4 * units,))
    ]
    if [tuple(weight.shape) for weight in weights] != shapes:
        return False
    if not all(weight.is_contiguous() for weight in weights):
        return False
    if x.dim() != 2 or not hidden.shape == cell.shape == (rows, layers * units):
        return False
    kernel = library()
    if kernel is None:
        return False
    sizes = array("q", (inputs[0], units, layers))
    pointers = array("Q", [tensor.data_ptr() for tensor in (*states, *weights)])
    strides = array("q", [stride for tensor in states for stride in tensor.stride()])
    failed = kernel.lo_lstm_step(
        rows,
        sizes.buffer_info()[0],
        pointers.buffer_info()[0],
        strides.buffer_info()[0],
        torch.get_num_threads(),
    )
    if failed:  # overlapping or misaligned memory, none left, or a compiler without vector types
        return False
    # Tensors of inference mode have no versions.
    _cpu.increment_versions([own for own in (hidden, cell) if not own.is_inference()])
    return True
