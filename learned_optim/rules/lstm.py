"""The thesis's update rule: one small LSTM shared by all coordinates (Andrychowicz et al. 2016).

Every coordinate runs the same network on its own gradient history, with its own hidden state
(thesis section 3.2.1). Inputs are the raw gradient (quadratics) or its log-magnitude and sign
(networks); the last layer's hidden state is read out linearly and scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learned_optim.rules._base import RuleConfig, State, StepContext, UpdateRule
from learned_optim.rules._lstm import LSTMStack
from learned_optim.rules._segments import Segments


def log_and_sign(grad: Tensor, p: float = 10.0) -> Tensor:
    """Log-magnitude and sign of the gradient (Andrychowicz et al. 2016, appendix A).

    ``(log|g| / p, sign g)`` where ``|g| >= e^-p`` and ``(-1, e^p g)`` below, so the features are
    continuous at the threshold and linear in ``g`` under it. An infinite gradient reads as the
    largest finite one; NaN stays NaN.

    Args:
        grad: gradient, any shape ``S``, floating point.
        p: magnitudes below ``e^-p`` fade linearly to zero.

    Returns:
        Features of shape ``(*S, 2)``, same dtype: scaled log-magnitude, then sign.
    """
    magnitude = grad.abs()
    # The lower bound keeps log() away from zero; the upper one reads inf as the largest number.
    log_magnitude = magnitude.clamp(math.exp(-p), torch.finfo(grad.dtype).max).log() / p
    # clamp(e^p g, -1, 1) is sign(g) above the threshold and e^p g below it; exp(p) overflows in
    # half precision, so the factor goes in as two square roots.
    root = math.exp(p / 2)
    sign = (grad * root * root).clamp(-1.0, 1.0)
    return torch.stack((log_magnitude, sign), dim=-1)


@dataclass(frozen=True)
class LSTMConfig(RuleConfig):
    """Architecture of :class:`LSTMRule`."""

    preprocessing: Literal["raw", "log_sign"] = "log_sign"
    """Input of the network: the gradient, or its log-magnitude and sign."""
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


class LSTMRule(UpdateRule):
    """Coordinatewise LSTM of ``num_layers`` x ``hidden_size`` units.

    State per coordinate: ``hidden`` and ``cell``, each ``num_layers * hidden_size`` numbers,
    layer after layer. Because of its biases a zero gradient still moves the parameter a little.
    """

    name = "lstm"
    Config = LSTMConfig
    test_configs = (LSTMConfig(), LSTMConfig(preprocessing="raw", hidden_size=5, num_layers=1))
    rows = "coordinates"
    network_state = LSTMStack.STATE
    config: LSTMConfig

    def __init__(self, config: LSTMConfig | None = None) -> None:
        super().__init__(config)
        features = 1 if self.config.preprocessing == "raw" else 2
        inputs = features * (2 if self.config.loss_input else 1)
        self.lstm = LSTMStack(inputs, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1)
        with torch.no_grad():
            # The untrained rule barely moves the parameters: unlearning random steps of full size
            # would take the first hundred meta-steps.
            self.readout.weight.mul_(0.1)
            self.readout.bias.zero_()

    @property
    def needs_loss(self) -> bool:
        return self.config.loss_input

    def init_state(self, param: Tensor) -> State:
        return self.lstm.zero_state(param, self.dtype)

    def tensor_features(
        self, means: Tensor, segments: Segments, context: StepContext
    ) -> tuple[None, Tensor | None]:
        """The loss, one per tensor, if it is read."""
        if not self.config.loss_input:
            return None, None
        if context.loss is None:
            raise ValueError(
                "this update rule reads the loss (loss_input=True): call step(closure) with a "
                "closure that returns it"
            )
        loss = context.loss.detach().to(means)
        return None, loss.expand(len(segments)).unsqueeze(0)

    def coordinate_features(
        self, grad: Tensor, state: State, param: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Preprocessed gradient and loss; the gain is the update itself."""
        features = self._preprocess(grad)
        if stats is not None:
            features = torch.cat((features, self._preprocess(stats[0])), dim=-1)
        return features, grad.new_ones(1, 1).expand(len(grad), 1)

    def _preprocess(self, x: Tensor) -> Tensor:
        """Features of shape ``(*x.shape, 1)`` or ``(*x.shape, 2)``."""
        if self.config.preprocessing == "raw":
            return x.unsqueeze(-1)
        return log_and_sign(x, self.config.p)

    def respond(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        out, new_state = self.lstm.sequence(features, state)
        return self.readout(out) * self.config.output_scale, new_state

    def respond_(self, features: Tensor, state: State) -> Tensor:
        return self.readout(self.lstm.step_(features, state)).mul_(self.config.output_scale)
