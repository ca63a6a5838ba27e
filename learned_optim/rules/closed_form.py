"""The horizon rule with its network replaced by a formula that a person can read and copy.

``learned-optim explain CHECKPOINT --formula FILE`` fits it to what a checkpoint's network answers
on runs: a few terms for the factor on the step and for each share, by least squares. It is there to
tell how much of what was learned fits into a line, and to be written down in another framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learned_optim.rules import _history as history
from learned_optim.rules._base import State, UpdateRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

#: Inputs of the network of ``horizon``, in its order; further ones are called ``input_21`` and on.
INPUT_NAMES = (
    "scale", "fan_in", "size", "is_vector", "age", "is_young", "known", "progress", "left",
    "length", "fast_share", "slow_share", "fast_signal", "slow_signal", "inequality",
    "agrees_fast", "agrees_fast_long", "agrees_slow", "live", "moved", "gradient_change", "trust",
)  # fmt: skip

#: What the formula gives: the log of the factor on the step, and the shares of the directions.
OUTPUT_NAMES = ("log_step", "fast", "slow", "gradient", "cautious")


def input_name(index: int) -> str:
    """Name of an input of the network."""
    return INPUT_NAMES[index] if index < len(INPUT_NAMES) else f"input_{index}"


@dataclass(frozen=True)
class ClosedFormConfig(HorizonConfig):
    """Which terms the formula has, beside the constants of horizon; ``hidden_size`` is not read."""

    outputs: tuple[str, ...] = ("log_step", "log_step")
    """Of every term, the output it adds to: one of :data:`OUTPUT_NAMES`."""
    terms: tuple[str, ...] = ("1", "left")
    """Products of inputs, such as ``left*age``; ``1`` is the constant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.outputs) != len(self.terms):
            raise ValueError(
                f"a formula has as many outputs as terms, got {len(self.outputs)} and "
                f"{len(self.terms)}"
            )
        if unknown := set(self.outputs) - set(OUTPUT_NAMES):
            raise ValueError(f"unknown outputs {sorted(unknown)}; known: {', '.join(OUTPUT_NAMES)}")
        known = {"1", *(input_name(index) for index in range(history.INPUTS + self.trusts))}
        used = {factor for term in self.terms for factor in term.split("*")}
        if unknown := used - known:
            raise ValueError(f"unknown inputs {sorted(unknown)}; known: {', '.join(sorted(known))}")


def term_values(term: str, inputs: Tensor) -> Tensor:
    """A term of the formula, ``(m,)``, of inputs ``(m, f)``."""
    columns = {input_name(index): index for index in range(inputs.shape[1])}
    value = torch.ones_like(inputs[:, 0])
    for factor in term.split("*"):
        if factor != "1":
            value = value * inputs[:, columns[factor]]
    return value


class ClosedFormRule(HorizonRule):
    """The rule ``horizon`` with a formula for its network.

    Its weights are the coefficients of the terms that the configuration names. State and
    directions are those of :class:`~learned_optim.rules.horizon.HorizonRule`, and so are the bounds
    of what the formula says. It runs in its pure form; the compiled kernel knows networks only.
    """

    name = "closed_form"
    Config = ClosedFormConfig
    test_configs = (
        ClosedFormConfig(
            warmup_steps=3,
            outputs=("log_step", "log_step", "fast", "cautious", "gradient"),
            terms=("1", "left*age", "fast_signal", "scale", "agrees_fast*agrees_fast"),
        ),
        ClosedFormConfig(),
    )
    config: ClosedFormConfig

    def __init__(self, config: ClosedFormConfig | None = None) -> None:
        UpdateRule.__init__(self, config)
        self.coefficients = nn.Parameter(torch.zeros(len(self.config.terms)))

    def answers(self, inputs: Tensor) -> Tensor:
        """The formula's outputs before they are bounded, ``(m, 5)``, of inputs ``(m, f)``."""
        columns = [torch.zeros_like(inputs[:, 0]) for _ in OUTPUT_NAMES]
        pairs = zip(self.config.outputs, self.config.terms, strict=True)
        for index, (output, term) in enumerate(pairs):
            place = OUTPUT_NAMES.index(output)
            columns[place] = columns[place] + self.coefficients[index] * term_values(term, inputs)
        return torch.stack(columns, dim=-1)

    def formula(self) -> dict[str, str]:
        """The formula in writing, by output."""
        lines: dict[str, str] = {}
        values = self.coefficients.tolist()
        for output, term, value in zip(self.config.outputs, self.config.terms, values, strict=True):
            part = f"{value:+.3g}" + ("" if term == "1" else f" {term.replace('*', ' ')}")
            lines[output] = f"{lines[output]} {part}" if output in lines else part
        return lines

    def step_(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State],
        **options: Any,
    ) -> None:  # fmt: skip
        """See :meth:`UpdateRule.step_`: the pure form."""
        UpdateRule.step_(self, params, grads, states, **options)
