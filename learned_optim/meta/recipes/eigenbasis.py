"""`general-8` trained further in the eigenbasis of matrices."""

from dataclasses import replace

from learned_optim.meta.recipes import general_8
from learned_optim.meta.recipes._evolution import EvolutionRecipe

RECIPE = EvolutionRecipe(
    rule=replace(general_8.RECIPE.rule, eigenbasis=True, adapter_power=0.0),
    start="general-8",
    task="populations-3",
    meta_steps=110,
    meta_lr=2e-3,
    meta_lr_final=1e-4,
    tasks_per_meta_step=10,
    pairs=3,
    sigma=0.03,
    large_from=0,
    large_share=0.5,
    validation_every=55,
    seed=0,
)
