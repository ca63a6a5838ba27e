"""The thesis's update rule: one small LSTM shared by all coordinates (Andrychowicz et al. 2016).

Every coordinate runs the same network on its own gradient history, with its own hidden state
(thesis section 3.2.1). Inputs are the raw gradient (quadratics) or its log-magnitude and sign
(networks); the last layer's hidden state is read out linearly and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_optim import preprocessing
from learned_optim.rules._base import RecurrentRule, RuleConfig, State


@dataclass(frozen=True)
class LSTMConfig(RuleConfig):
    """Architecture of :class:`LSTMRule`."""

    preprocessing: Literal["raw", "log_sign"] = "log_sign"
    """What the network sees of the gradient: itself, or its log-magnitude and sign."""
    p: float = 10.0
    """Gradients below e^-p fade to zero; only for log_sign."""
    hidden_size: int = 20
    """Units per LSTM layer."""
    num_layers: int = 2
    """Stacked LSTM layers."""
    output_scale: float = 0.1
    """Factor on the read-out: 1.0 for quadratics, 0.1 for networks (thesis section 4.3)."""
    loss_input: bool = False
    """Also feed the loss, preprocessed like the gradient (Ravi and Larochelle 2017)."""

    def __post_init__(self) -> None:
        if self.preprocessing not in ("raw", "log_sign"):
            raise ValueError(f"preprocessing {self.preprocessing!r} is neither 'raw' nor 'log_sign'")
        if self.p <= 0:
            raise ValueError(f"p must be positive, got {self.p}")
        if self.hidden_size < 1 or self.num_layers < 1:
            raise ValueError(
                f"hidden_size and num_layers must be at least 1, "
                f"got {self.hidden_size} and {self.num_layers}"
            )


class LSTMRule(RecurrentRule):
    """Coordinatewise LSTM of ``num_layers`` x ``hidden_size`` units.

    State per coordinate: ``hidden`` and ``cell``, each ``num_layers * hidden_size`` numbers,
    layer after layer. A zero gradient still moves the parameter a little (the biases see to
    that); rules that promise otherwise set ``zero_preserving``.
    """

    name = "lstm"
    Config = LSTMConfig
    network_state = ("hidden", "cell")
    config: LSTMConfig

    def __init__(self, config: LSTMConfig | None = None) -> None:
        super().__init__(config)
        features = 1 if self.config.preprocessing == "raw" else 2
        inputs = features * (2 if self.config.loss_input else 1)
        self.lstm = _LSTMWeights(inputs, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1)
        with torch.no_grad():
            # An untrained rule should barely move the optimizee: a random direction of full size
            # costs the first hundred meta-steps to unlearn.
            self.readout.weight.mul_(0.1)
            self.readout.bias.zero_()
        self._fast: _FastWeights | None = None

    @property
    def needs_loss(self) -> bool:
        return self.config.loss_input

    def init_state(self, param: Tensor) -> State:
        width = self.config.num_layers * self.config.hidden_size
        like = torch.zeros_like(param, dtype=self.dtype, memory_format=torch.contiguous_format)
        zeros = like.unsqueeze(-1).repeat(*(1,) * param.dim(), width)
        return {"hidden": zeros, "cell": zeros.clone()}

    def _features(self, grad: Tensor, loss: Tensor | None) -> Tensor:
        """Network inputs of shape ``(*grad.shape, k)``."""

        def pre(x: Tensor) -> Tensor:
            if self.config.preprocessing == "raw":
                return preprocessing.raw(x)
            return preprocessing.log_and_sign(x, self.config.p)

        features = pre(grad)
        if not self.config.loss_input:
            return features
        if loss is None:
            raise ValueError(
                "this update rule reads the loss (loss_input=True): call step(closure) with a "
                "closure that returns it"
            )
        of_loss = pre(loss.detach().to(grad)).expand(*grad.shape, -1)
        return torch.cat((features, of_loss), dim=-1)

    def observe(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._features(grad, loss), {}

    def forward(
        self, grad: Tensor, state: State, param: Tensor, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x = self._features(grad, loss)
        hidden, cell = [], []
        layers = zip(
            state["hidden"].chunk(self.config.num_layers, dim=-1),
            state["cell"].chunk(self.config.num_layers, dim=-1),
            strict=True,
        )
        for layer, (h, c) in enumerate(layers):
            w_ih, w_hh, b_ih, b_hh = self._layer(layer)
            gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
            i, f, g, o = gates.chunk(4, dim=-1)  # each (*param.shape, hidden_size)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            hidden.append(x)
            cell.append(c)
        update = self.readout(x).squeeze(-1) * self.config.output_scale
        return update, {"hidden": torch.cat(hidden, -1), "cell": torch.cat(cell, -1)}

    def respond(self, signals: Tensor, state: State) -> tuple[Tensor, State]:
        layers, size = self.config.num_layers, self.config.hidden_size

        def unstack(x: Tensor) -> Tensor:  # (n, layers * size) -> (layers, n, size)
            return x.unflatten(-1, (layers, size)).transpose(0, 1).contiguous()

        weights = [w for layer in range(layers) for w in self._layer(layer)]
        h0, c0 = unstack(state["hidden"]), unstack(state["cell"])
        # The functional form, because nn.LSTM caches its weights and would miss functional_call's.
        out, h, c = torch.lstm(signals, (h0, c0), weights, True, layers, 0.0, False, False, False)
        updates = self.readout(out).squeeze(-1) * self.config.output_scale  # (T, n)
        return updates, {k: v.transpose(0, 1).flatten(1) for k, v in (("hidden", h), ("cell", c))}

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (getattr(self.lstm, f"{name}_l{layer}") for name in names)
        return w_ih, w_hh, b_ih, b_hh

    @torch.no_grad()
    def respond_(self, signals: Tensor, state: State) -> Tensor:
        fast = self._fast_weights()
        hidden, size = state["hidden"], self.config.hidden_size
        gates = signals.new_empty(signals.shape[0], 4 * size)
        fast.run(signals, hidden, state["cell"], gates)
        return torch.addmv(fast.readout_bias, hidden[:, -size:], fast.readout)

    def _fast_weights(self) -> _FastWeights:
        key = tuple((w.data_ptr(), w._version) for w in self.parameters())
        if self._fast is None or self._fast.key != key:
            self._fast = _FastWeights(self, key)
        return self._fast

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}


class _LSTMWeights(nn.Module):
    """The parameters of an ``nn.LSTM`` under its own names, drawn as it draws them.

    Nothing here runs ``nn.LSTM`` itself, and torch.compile refuses any module that holds one.
    """

    def __init__(self, inputs: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        for name, weight in nn.LSTM(inputs, hidden_size, num_layers).named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach()))


class _FastWeights:
    """Weights rearranged so that one sigmoid serves all gates: tanh(z) = 2 sigmoid(2z) - 1.

    The candidate gate's weights are doubled; gates are reordered from i, f, g, o to i, f, o, g.
    """

    def __init__(self, rule: LSTMRule, key: tuple[tuple[int, int], ...]) -> None:
        self.key = key
        self.size = rule.config.hidden_size

        def arrange(w: Tensor) -> Tensor:  # (4 * size, k), gates i, f, g, o -> i, f, o, 2g
            i, f, g, o = w.detach().chunk(4)
            return torch.cat((i, f, o, 2 * g))

        self.products: list[Tensor] = []  # per layer: (inputs + size, 4 * size)
        self.biases: list[Tensor] = []  # per layer: (4 * size,)
        for layer in range(rule.config.num_layers):
            w_ih, w_hh, b_ih, b_hh = rule._layer(layer)
            self.products.append(torch.cat((arrange(w_ih), arrange(w_hh)), 1).t().contiguous())
            self.biases.append(arrange(b_ih + b_hh))
        out = rule.config.output_scale
        self.readout = rule.readout.weight.detach()[0] * out  # (size,)
        self.readout_bias = rule.readout.bias.detach() * out  # (1,)

    def run(self, x: Tensor, h: Tensor, c: Tensor, gates: Tensor) -> None:
        """One step of all layers on a block of ``n`` rows, in place in ``h`` and ``c``.

        Args:
            x: features, ``(n, k)``.
            h: hidden state, ``(n, layers * size)``; ``c`` likewise.
            gates: buffer of ``(n, 4 * size)``.
        """
        size = self.size
        i, f, o, g = gates.chunk(4, dim=1)
        for layer, (weight, bias) in enumerate(zip(self.products, self.biases, strict=True)):
            own = slice(layer * size, (layer + 1) * size)
            if layer == 0:
                torch.addmm(bias, x, weight[: x.shape[1]], out=gates)
                gates.addmm_(h[:, own], weight[x.shape[1] :])
            else:
                # The new state of the layer below and this layer's own lie side by side.
                torch.addmm(bias, h[:, own.start - size : own.stop], weight, out=gates)
            gates.sigmoid_()
            cell = c[:, own]
            cell.mul_(f).addcmul_(i, g, value=2.0).sub_(i)  # f c + i (2 sigmoid(2g) - 1)
            tanh_cell = (2.0 * cell).sigmoid_().mul_(2.0).sub_(1.0)
            torch.mul(o, tanh_cell, out=h[:, own])
