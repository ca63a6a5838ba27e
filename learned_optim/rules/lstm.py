"""The thesis's update rule: one small LSTM shared by all coordinates (Andrychowicz et al. 2016).

Every coordinate runs the same network on its own gradient history, with its own hidden state
(thesis section 3.2.1). Inputs are the raw gradient (quadratics) or its log-magnitude and sign
(networks); the last layer's hidden state is read out linearly and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learned_optim import preprocessing
from learned_optim.rules._base import RecurrentRule, RuleConfig, State
from learned_optim.rules._stack import LSTMStack


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
            raise ValueError(
                f"preprocessing {self.preprocessing!r} is neither 'raw' nor 'log_sign'"
            )
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
    network_state = LSTMStack.STATE
    config: LSTMConfig

    def __init__(self, config: LSTMConfig | None = None) -> None:
        super().__init__(config)
        features = 1 if self.config.preprocessing == "raw" else 2
        inputs = features * (2 if self.config.loss_input else 1)
        self.lstm = LSTMStack(inputs, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1)
        with torch.no_grad():
            # An untrained rule should barely move the optimizee: a random direction of full size
            # costs the first hundred meta-steps to unlearn.
            self.readout.weight.mul_(0.1)
            self.readout.bias.zero_()

    @property
    def needs_loss(self) -> bool:
        return self.config.loss_input

    def init_state(self, param: Tensor) -> State:
        return self.lstm.zero_state(param, self.dtype)

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
        out, new_state = self.lstm.step(self._features(grad, loss), state)
        return self._read_out(out), new_state

    def respond(self, signals: Tensor, state: State) -> tuple[Tensor, State]:
        out, new_state = self.lstm.sequence(signals, state)
        return self._read_out(out), new_state

    def respond_(self, signals: Tensor, state: State) -> Tensor:
        out = self.lstm.step_(signals, state)
        bias, weight = self.readout.bias, self.readout.weight[0]
        return torch.addmv(bias, out, weight).mul_(self.config.output_scale)

    def _read_out(self, out: Tensor) -> Tensor:
        """Updates ``(*S,)`` from hidden states ``(*S, hidden_size)``."""
        return self.readout(out).squeeze(-1) * self.config.output_scale
