"""The thesis's section 4.2: random 10-dimensional quadratics, raw gradients, no rescaling.
Two hours.

Rarely a function's steepest direction makes a whole run explode, and its meta-gradient with it:
32 functions per meta-step and clipping keep such runs from undoing the others.
"""

from learned_optim.meta.recipes import Recipe
from learned_optim.rules.lstm import LSTMConfig

RECIPE = Recipe(
    task="quadratic",
    rule=LSTMConfig(preprocessing="raw", output_scale=1.0),
    epochs=100,
    meta_lr=5e-3,
    meta_lr_final=1e-4,
    tasks_per_meta_step=32,
    clip_norm=10.0,
    average=0.98,
    validation_runs=1000,
    test_runs=1000,
)
