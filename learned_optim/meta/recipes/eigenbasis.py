"""The weights of `diagonal`, trained further in the eigenbasis of matrices.
An hour and a half on one core.
"""

from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    rule=HorizonConfig(eigenbasis=True),
    start="diagonal",
    task="populations-3",
    meta_steps=110,
    meta_lr=2e-3,
    meta_lr_final=1e-4,
    tasks_per_meta_step=10,
    pairs=3,
    large_from=0,
    large_share=0.5,
    validation_every=55,
)
