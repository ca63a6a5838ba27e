"""`general-3` with a trust that grows with the agreement of gradients, trained further.
Five minutes on two cores.

The weights start as those of `general-3`, so that the trust is what is new, and training is short:
it adapts what is there. The mixture has more of what long first steps destroy - trained weights,
transformers - and layers of up to 2,048 units.
"""

from learned_optim.meta.recipes._evolution import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    rule=HorizonConfig(trust_start=-3.0, trust_gain=1.5),
    start="general-3",
    task="populations-2",
    meta_steps=40,
    meta_lr=1e-3,
    meta_lr_final=1e-4,
    tasks_per_meta_step=10,
    pairs=3,
    sigma=0.03,
    large_from=0,
    large_share=0.5,
    seed=1,
)
