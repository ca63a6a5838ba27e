"""Evaluation: learned optimizers, untuned, beside hand-written ones that were tuned."""

from learned_optim.evaluation.baselines import BASELINES, Baseline, make_baseline
from learned_optim.evaluation.compare import compare
from learned_optim.evaluation.protocol import EvaluateConfig, Evaluation
from learned_optim.evaluation.statistics import worth
from learned_optim.summary import brief, markdown, plot_worth, write_report

__all__ = [
    "BASELINES",
    "Baseline",
    "EvaluateConfig",
    "Evaluation",
    "brief",
    "compare",
    "make_baseline",
    "markdown",
    "plot_worth",
    "worth",
    "write_report",
]
