"""The general-purpose rule, trained further: from ``general``, with twice the units.
One to two hours.

Unrolls of 50 and 100 steps instead of 20 and 50, because what escapes a plateau pays only later;
a mixture with more of the thesis's tasks; coordinates sampled tensor by tensor, because an output
layer carries much of the meta-gradient; and the tensor's scale reaches the gains directly. The
finished weights are halfway between the first and the best, which forget something of networks
deeper and wider than those of the mixture.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general
from learned_optim.rules.equivariant import EquivariantConfig

RECIPE = replace(
    general.RECIPE,
    task="general-2",
    start="general",
    start_share=0.5,
    rule=EquivariantConfig(hidden_size=16, square_beta=0.99, direct=True),
    epochs=8,
    truncation=50,
    long_truncation=100,
    sampling="stratified",
    meta_lr=2e-3,
    meta_lr_final=1e-4,
    average=0.995,
    validation_runs=48,
)
