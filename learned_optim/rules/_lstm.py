"""A stack of LSTM layers: a differentiable sequence and an in-place step, which agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learned_optim import kernels
from learned_optim.rules._features import zeros_by_column
from learned_optim.rules._step import State


class LSTMStack(nn.Module):
    """LSTM layers with state ``hidden`` and ``cell``, layers side by side.

    The parameters are named and drawn as those of ``nn.LSTM``, which is not a base class because
    torch.compile traces no module that holds one. ``inputs`` are features per coordinate.
    """

    STATE = ("hidden", "cell")

    def __init__(self, inputs: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        for name, weight in nn.LSTM(inputs, hidden_size, num_layers).named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach()))

    def zero_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """``hidden`` and ``cell``, each ``(*param.shape, num_layers * hidden_size)``."""
        width = self.num_layers * self.hidden_size
        zeros = zeros_by_column(param, width, dtype)
        return {"hidden": zeros, "cell": zeros.clone()}

    def sequence(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """All steps of a sequence, differentiable in the weights.

        Args:
            x: features, ``(T, n, inputs)``.
            state: ``hidden`` and ``cell`` before step 0, each ``(n, num_layers * hidden_size)``.

        Returns:
            The last layer's hidden states ``(T, n, hidden_size)``, and the state after step T.
        """

        if not x.shape[1]:
            return x.new_zeros(*x.shape[:2], self.hidden_size), state

        def unstack(s: Tensor) -> Tensor:  # (n, layers * size) -> (layers, n, size)
            return s.unflatten(-1, (self.num_layers, self.hidden_size)).transpose(0, 1).contiguous()

        start = (unstack(state["hidden"]), unstack(state["cell"]))
        # The functional form, because nn.LSTM caches its weights and would miss functional_call's.
        out, h, c = torch.lstm(
            x, start, self.weights(), True, self.num_layers, 0.0, False, False, False
        )
        return out, {"hidden": h.transpose(0, 1).flatten(1), "cell": c.transpose(0, 1).flatten(1)}

    @torch.no_grad()
    def step_(self, x: Tensor, state: State) -> Tensor:
        """One step of :meth:`sequence` for a block of rows, in place in ``state``.

        One sigmoid serves all gates and, as tanh(z) = 2 sigmoid(2z) - 1, the candidate: eager tanh
        is several times slower on many processors. All matrices are transposed, so that a gate is
        contiguous in memory, as is a column of the state from :meth:`zero_state`.

        Args:
            x: features, ``(n, inputs)``.
            state: ``hidden`` and ``cell``, each ``(n, num_layers * hidden_size)``.

        Returns:
            The last layer's hidden state, ``(n, hidden_size)``, a view into ``state``.
        """
        size, weights = self.hidden_size, self.weights()
        if torch.compiler.is_compiling():
            out, new = self.sequence(x.unsqueeze(0), state)
            for key, value in new.items():
                state[key].copy_(value)
            return out[0]
        if kernels.lstm_step_(x, state["hidden"], state["cell"], weights, self.num_layers):
            return state["hidden"][:, -size:]
        x, hidden, cells = x.t(), state["hidden"].t(), state["cell"].t()
        gates = x.new_empty(4 * size, x.shape[1])
        i, f, g, o = gates.chunk(4)
        doubled = x.new_ones(4 * size, 1)
        doubled[2 * size : 3 * size] = 2.0
        for layer in range(self.num_layers):
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
            own = hidden[layer * size : (layer + 1) * size]
            torch.addmm((b_ih + b_hh).unsqueeze(1) * doubled, w_ih * doubled, x, out=gates)
            gates.addmm_(w_hh * doubled, own).sigmoid_()
            cell = cells[layer * size : (layer + 1) * size]
            cell.mul_(f).addcmul_(i, g, value=2.0).sub_(i)  # f c + i (2 sigmoid(2g) - 1)
            tanh_cell = torch.mul(cell, 2.0, out=g).sigmoid_().mul_(2.0).sub_(1.0)
            x = torch.mul(o, tanh_cell, out=own)
        return hidden[-size:].t()

    def weights(self) -> list[Tensor]:
        """``weight_ih, weight_hh, bias_ih, bias_hh`` of each layer."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self, f"{n}_l{layer}") for layer in range(self.num_layers) for n in names]
