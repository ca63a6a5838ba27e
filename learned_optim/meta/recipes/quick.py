"""A first meta-training, in about three minutes: the coordinatewise rule on scikit-learn's digits.

A small network and short runs; nothing is downloaded. The rule learns this task alone, on which its
summed loss ends below tuned Adam's. A general-purpose rule takes hours.
"""

from learned_optim.meta.recipes import Recipe
from learned_optim.rules.equivariant import EquivariantConfig

RECIPE = Recipe(
    task="digits-torch",
    rule=EquivariantConfig(square_beta=0.99),
    epochs=10,
    runs_per_epoch=30,
    meta_lr=1e-2,
    meta_lr_final=1e-3,
    clip_norm=1.0,
    average=0.95,
    validation_runs=16,
    test_runs=50,
)
