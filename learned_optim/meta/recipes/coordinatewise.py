"""A sign-equivariant LSTM per coordinate, on a mixture of small tasks of every kind, from scratch.
Two to four hours.

The shipped weights were trained in two stages: 8 units by unrolls of 20 and 50 steps, then, from
these, 16 units as here; they are the mean of the second stage's first and best weights. One
optimizee per meta-step, because in a given time many noisy meta-steps beat few good ones. A quarter
of the runs is longer than 100 steps, up to 2,000: short runs alone teach greed, and a rule that
stalls later. Unrolls are long because what escapes a plateau pays late.
"""

from learned_optim.meta.recipes import Recipe
from learned_optim.rules.equivariant import EquivariantConfig

RECIPE = Recipe(
    task="small-tasks",
    rule=EquivariantConfig(hidden_size=16, square_beta=0.99, direct=True),
    epochs=24,
    runs_per_epoch=250,
    horizon=100,
    truncation=50,
    long_horizon=2000,
    long_fraction=0.25,
    long_truncation=100,
    unrolls_per_run=6,
    coordinates=1000,
    sampling="stratified",
    meta_lr=3e-3,
    meta_lr_final=3e-5,
    clip_norm=1.0,
    relative_loss=True,
    average=0.995,
    validation_runs=48,
    validation_horizon=200,
    validation_mean="geometric",
    patience=10,
)
