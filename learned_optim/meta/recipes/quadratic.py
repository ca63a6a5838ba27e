"""The thesis's section 4.2: random 10-dimensional quadratics, raw gradients, no rescaling."""

from learned_optim.meta.recipes._base import Recipe
from learned_optim.rules.lstm import LSTMConfig

RECIPE = Recipe(
    task="quadratic",
    rule=LSTMConfig(preprocessing="raw", output_scale=1.0),
    epochs=100,
    meta_lr=3e-3,
    tasks_per_meta_step=32,
    validation_runs=1000,
    test_runs=1000,
)
