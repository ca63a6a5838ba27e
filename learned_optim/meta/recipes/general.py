"""The general-purpose rule: sign-equivariant, on a mixture of small tasks of every kind.
One to two hours.

One optimizee per meta-step, because in a given time many noisy meta-steps beat few good ones.
A quarter of the runs is longer than 100 steps, up to 2,000, and learns from unrolls of 50: short
unrolls alone teach greed, and a rule that stalls later.
"""

from learned_optim.meta.recipes._base import Recipe
from learned_optim.rules.equivariant import EquivariantConfig

RECIPE = Recipe(
    task="general",
    rule=EquivariantConfig(hidden_size=8, square_beta=0.99),
    epochs=24,
    runs_per_epoch=250,
    horizon=100,
    truncation=20,
    long_horizon=2000,
    long_fraction=0.25,
    long_truncation=50,
    unrolls_per_run=6,
    coordinates=1000,
    meta_lr=3e-3,
    meta_lr_final=3e-5,
    clip_norm=1.0,
    relative_loss=True,
    average=0.99,
    validation_runs=32,
    validation_horizon=200,
    validation_mean="geometric",
    patience=10,
)
