"""Constants of the rule `horizon`."""

from __future__ import annotations

from dataclasses import dataclass, field

from learned_optim.rules._config import ADDED, RuleConfig


@dataclass(frozen=True)
class HorizonConfig(RuleConfig):
    """Architecture of :class:`HorizonRule`."""

    eigenbasis: bool = field(default=False, metadata=ADDED)
    """Whether matrices are stepped in the eigenbasis of their gradients' covariances."""
    hidden_size: int = 16
    """Units of the network."""
    fast_beta: float = 0.9
    """Decay of the fast momentum."""
    slow_beta: float = 0.99
    """Decay of the slow momentum."""
    square_beta: float = 0.99
    """Decay of the mean square that normalizes."""
    base_step: float = 0.1
    """Step of the untrained rule, in units of the tensor's scale."""
    largest_scale: float = 0.1
    """Bound of the scale that the shape of a matrix gives, ``1 / sqrt(fan_in)``: a fan-in of a few
    says nothing about an embedding of that width or an adapter of that rank."""
    smallest_share: float = 0.25
    """A tensor's scale is at least this share of what its shape suggests: weights that start at
    zero have to leave it, and weights that start small, as in a sine network, are meant to be."""
    warmup_share: float = 0.1
    """Warm-up, in units of the run's length: between 10 and 250 steps."""
    warmup_steps: int = 50
    """Warm-up where the length of the run is unknown."""
    trust_start: float = field(default=0.0, metadata=ADDED)
    """Log of the trust at a tensor's first step; 0 for none."""
    trust_gain: float = field(default=0.0, metadata=ADDED)
    """What a correlation of 1 between a gradient and the momentum before it adds to that log."""
    trust_later_gain: float = field(default=0.0, metadata=ADDED)
    """The same once the trust has been whole, where the length of the run is unknown: it may then
    fall again; 0: it stays."""
    trust_known_gain: float = field(default=0.0, metadata=ADDED)
    """The same where the length of the run is known, of the correlation plus ``trust_margin``."""
    trust_margin: float = field(default=0.0, metadata=ADDED)
    """Correlation below minus which the trust falls where the length of the run is known."""
    trust_growth: float = field(default=0.0, metadata=ADDED)
    """If above 0, what makes a whole trust fall where the length is known, while the mean
    correlation is below minus ``trust_margin``: this times the log of the gradient's mean square
    over its moving average, less 0.3. The correlation then only lets it grow back."""
    decay_power: float = field(default=1.0, metadata=ADDED)
    """Power of the schedule that weight decay follows: above 1 it is over before the steps are, so
    that the weights of the end are not held away from where they fit."""
    decay_live: bool = field(default=False, metadata=ADDED)
    """Whether weight decay spares coordinates whose gradient is zero, as in the rows of a table
    that a batch does not touch."""
    adapter_power: float = field(default=0.0, metadata=ADDED)
    """Power of width over height by which the steps of a matrix that starts at zero are shorter, if
    it is taller than wide and all of it has a gradient: the second one of a low-rank adapter, whose
    rank says nothing about how far it may go."""
    weight_decay: float = field(default=0.0, metadata=ADDED)
    """Weight decay of users who give none, where the length of the run is known: in runs of up to
    4,000 steps; in longer ones less, in inverse proportion, so that weights shrink alike."""

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        if self.trust_start > 0:
            raise ValueError(f"trust_start must be at most 0, got {self.trust_start}")
        for name in (
            "trust_gain",
            "trust_later_gain",
            "trust_known_gain",
            "trust_margin",
            "trust_growth",
            "weight_decay",
            "decay_power",
            "adapter_power",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def trusts(self) -> bool:
        """Whether there is a trust, which the network then reads."""
        return self.trust_start < 0
