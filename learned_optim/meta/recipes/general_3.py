"""The general-purpose rule that knows its horizon, by evolution strategies on whole runs.
One and a half to two hours on two cores.

Sixty runs per meta-step, six for each of ten tasks. The step size is large because differences are
compressed and Adam normalizes what is left of their scale.
"""

from learned_optim.meta.recipes._evolution import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    rule=HorizonConfig(),
    meta_steps=500,
    meta_lr=8e-3,
    meta_lr_final=5e-4,
    tasks_per_meta_step=10,
    pairs=3,
    sigma=0.03,
    large_from=210,
    seed=0,
)
