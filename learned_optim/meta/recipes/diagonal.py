"""The rule with a built-in schedule, by evolution strategies on whole runs, from scratch.
Two hours on two cores.

Sixty runs per meta-step, six for each of ten tasks. The meta-learning rate is large because
differences of fitness are compressed and Adam normalizes what is left of their scale. The shipped
weights were trained in two stages: 500 meta-steps on an earlier mixture without the configuration's
step confidence, 40 with it on this mixture; later configurations kept the weights.
"""

from learned_optim.meta.recipes import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    task="populations-2",
    rule=HorizonConfig(),
    meta_steps=500,
    meta_lr=8e-3,
    meta_lr_final=5e-4,
    tasks_per_meta_step=10,
    pairs=3,
    large_from=210,
)
