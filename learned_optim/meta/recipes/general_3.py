"""The general-purpose rule that knows its horizon, by evolution strategies on whole runs.
One and a half to two hours on two cores.

Sixty-four runs per meta-step, eight for each of eight tasks; a step size of a hundredth because
differences are compressed and Adam normalizes what is left of their scale.
"""

from learned_optim.meta.recipes._evolution import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    rule=HorizonConfig(),
    meta_steps=600,
    meta_lr=1e-2,
    meta_lr_final=8e-4,
    tasks_per_meta_step=8,
    pairs=4,
    sigma=0.03,
    seed=0,
)
