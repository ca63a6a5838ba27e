"""A stack of LSTM layers in three forms that agree: a pure step, a sequence, an in-place step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim.rules._base import State, zeros_by_feature


class LSTMStack(nn.Module):
    """LSTM layers whose state is kept as ``hidden`` and ``cell``, layers side by side.

    The parameters are named and drawn as those of ``nn.LSTM``, which is not a base class because
    torch.compile traces no module that holds one. The in-place step works on a rearranged copy of
    the weights, which follows every change that autograd can see; writes through ``weight.data``
    are not seen.

    Args:
        inputs: features per coordinate.
        hidden_size: units per layer.
        num_layers: layers.
    """

    STATE = ("hidden", "cell")

    def __init__(self, inputs: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        for name, weight in nn.LSTM(inputs, hidden_size, num_layers).named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach()))
        self._fast: _FastWeights | None = None

    def zero_state(self, param: Tensor, dtype: torch.dtype) -> State:
        """``hidden`` and ``cell``, each ``(*param.shape, num_layers * hidden_size)``."""
        width = self.num_layers * self.hidden_size
        zeros = zeros_by_feature(param, width, dtype)
        return {"hidden": zeros, "cell": zeros.clone()}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step, pure, on any leading dimensions.

        Args:
            x: features, ``(*S, inputs)``.
            state: ``hidden`` and ``cell``, each ``(*S, num_layers * hidden_size)``.

        Returns:
            The last layer's hidden state ``(*S, hidden_size)``, and the new state.
        """
        hidden, cell = [], []
        layers = zip(
            state["hidden"].chunk(self.num_layers, dim=-1),
            state["cell"].chunk(self.num_layers, dim=-1),
            strict=True,
        )
        for layer, (h, c) in enumerate(layers):
            w_ih, w_hh, b_ih, b_hh = self.layer(layer)
            gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
            i, f, g, o = gates.chunk(4, dim=-1)  # each (*S, hidden_size)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            hidden.append(x)
            cell.append(c)
        return x, {"hidden": torch.cat(hidden, -1), "cell": torch.cat(cell, -1)}

    def sequence(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """All steps of a sequence, differentiable in the weights.

        Args:
            x: features, ``(T, n, inputs)``.
            state: ``hidden`` and ``cell`` before step 0, each ``(n, num_layers * hidden_size)``.

        Returns:
            The last layer's hidden states ``(T, n, hidden_size)``, and the state after step T.
        """

        def unstack(s: Tensor) -> Tensor:  # (n, layers * size) -> (layers, n, size)
            return s.unflatten(-1, (self.num_layers, self.hidden_size)).transpose(0, 1).contiguous()

        weights = [w for layer in range(self.num_layers) for w in self.layer(layer)]
        start = (unstack(state["hidden"]), unstack(state["cell"]))
        # The functional form, because nn.LSTM caches its weights and would miss functional_call's.
        out, h, c = torch.lstm(x, start, weights, True, self.num_layers, 0.0, False, False, False)
        return out, {"hidden": h.transpose(0, 1).flatten(1), "cell": c.transpose(0, 1).flatten(1)}

    @torch.no_grad()
    def step_(
        self, x: Tensor, state: State, shared: Tensor | None = None, owner: Tensor | None = None
    ) -> Tensor:
        """:meth:`step` on a block of rows, in place in ``state``.

        Args:
            x: features, ``(n, inputs)``, or the first of them if there are ``shared`` ones.
            state: ``hidden`` and ``cell``, each ``(n, num_layers * hidden_size)``.
            shared: the other features where many rows have the same, ``(m, k)``.
            owner: which row of ``shared`` each row has, ``(n,)``; ``None`` where m is 1.

        Returns:
            The last layer's hidden state, ``(n, hidden_size)``, a view into ``state``.
        """
        key = tuple((w.data_ptr(), w._version) for w in self._parameters.values() if w is not None)
        if self._fast is None or self._fast.key != key:
            self._fast = _FastWeights(self, key)
        hidden, size = state["hidden"], self.hidden_size
        gates = x.new_empty(4 * size, x.shape[0])
        # Transposed, a gate is contiguous, and so is a row of states as zero_state lays them out.
        said = None if shared is None else shared.t()
        self._fast.run(x.t(), hidden.t(), state["cell"].t(), gates, said, owner)
        return hidden[:, -size:]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``weight_ih, weight_hh, bias_ih, bias_hh`` of one layer."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (getattr(self, f"{name}_l{index}") for name in names)
        return w_ih, w_hh, b_ih, b_hh

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}


@lru_cache(maxsize=1)
def tanh_is_cheap() -> bool:
    """Whether eager tanh costs less than two sigmoids on this processor: 0.7 of one, or ten.

    Far enough from either that measuring decides alike every time.
    """
    x = torch.linspace(-2.0, 2.0, 1 << 12)

    def seconds(function: Callable[[Tensor], Tensor]) -> float:
        times = []
        for _ in range(8):
            started = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.tanh) < 2.0 * seconds(torch.sigmoid)


class _FastWeights:
    """Weights rearranged so that one call serves all sigmoid gates: i, f, o, g for i, f, g, o.

    Where tanh is dear, the candidate gate's weights are doubled and the same sigmoid serves it as
    well: tanh(z) = 2 sigmoid(2z) - 1.
    """

    def __init__(self, stack: LSTMStack, key: tuple[tuple[int, int], ...]) -> None:
        self.key = key
        self.size = stack.hidden_size
        self.tanh = tanh_is_cheap()

        def arrange(w: Tensor) -> Tensor:  # (4 * size, k)
            i, f, g, o = w.detach().chunk(4)
            return torch.cat((i, f, o, g if self.tanh else 2 * g))

        self.products: list[Tensor] = []  # per layer: (4 * size, inputs + size)
        self.biases: list[Tensor] = []  # per layer: (4 * size, 1)
        for layer in range(stack.num_layers):
            w_ih, w_hh, b_ih, b_hh = stack.layer(layer)
            self.products.append(torch.cat((arrange(w_ih), arrange(w_hh)), 1))
            self.biases.append(arrange(b_ih + b_hh).unsqueeze(1))

    def run(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        shared: Tensor | None,
        owner: Tensor | None,
    ) -> None:
        """One step of all layers on a block of ``n`` coordinates, in place in ``h`` and ``c``.

        Args:
            x: features, ``(k, n)``.
            h: hidden state, ``(layers * size, n)``; ``c`` likewise.
            gates: buffer of ``(4 * size, n)``.
            shared: see :meth:`LSTMStack.step_`, transposed; ``owner`` likewise.
        """
        size, seen = self.size, x.shape[0]
        i, f, o, g = gates.chunk(4)
        for layer, (weight, bias) in enumerate(zip(self.products, self.biases, strict=True)):
            own = slice(layer * size, (layer + 1) * size)
            if layer == 0:
                if shared is not None:
                    bias = torch.addmm(bias, weight[:, seen:-size], shared)  # (4 * size, m)
                if owner is None:
                    torch.addmm(bias, weight[:, :seen], x, out=gates)
                else:
                    torch.index_select(bias, 1, owner, out=gates).addmm_(weight[:, :seen], x)
                gates.addmm_(weight[:, -size:], h[own])
            else:
                # The new state of the layer below and this layer's own lie side by side.
                torch.addmm(bias, weight, h[own.start - size : own.stop], out=gates)
            cell = c[own]
            if self.tanh:
                gates[: 3 * size].sigmoid_()
                cell.mul_(f).addcmul_(i, g.tanh_())
                torch.mul(o, torch.tanh(cell, out=g), out=h[own])
                continue
            gates.sigmoid_()
            cell.mul_(f).addcmul_(i, g, value=2.0).sub_(i)  # f c + i (2 sigmoid(2g) - 1)
            tanh_cell = torch.mul(cell, 2.0, out=g).sigmoid_().mul_(2.0).sub_(1.0)
            torch.mul(o, tanh_cell, out=h[own])


def widened(name: str, own: Tensor, narrow: Tensor) -> Tensor | None:
    """A weight of a wider network that computes what the narrower one does, to begin with.

    The first units are the narrower network's and read nothing of the others, nor does the readout.

    Args:
        name: ``lstm.*`` as in :class:`LSTMStack`, or ``readout.weight``.
        own: the wider network's weight: new units keep what they have of it.
        narrow: the narrower network's.

    Returns:
        The weight, shaped like ``own``; ``None`` where ``narrow`` is not the narrower one's.
    """
    wide = own.clone()
    gates = 4 if name.startswith("lstm.") else 1
    part = wide.unflatten(0, (gates, -1))  # a view: (gates, units, *)
    small = narrow.unflatten(0, (gates, -1))
    if small.shape[1] > part.shape[1] or small.shape[2:] > part.shape[2:]:
        return None
    if narrow.dim() == 1:
        part[:, : small.shape[1]] = small
        return wide
    part[:, : small.shape[1], small.shape[2] :] = 0.0
    part[:, : small.shape[1], : small.shape[2]] = small
    return wide
