"""A first one by evolution strategies: `general-4`, adapted to scikit-learn's digits.

Whole runs of a small network, the way `general-4` was trained on a mixture; nothing is downloaded.
On tasks of your own: `meta_train(task, "quick-evolution", folder=...)`.
"""

from learned_optim.meta.recipes._evolution import EvolutionRecipe
from learned_optim.rules.horizon import HorizonConfig

RECIPE = EvolutionRecipe(
    rule=HorizonConfig(trust_start=-3.0, trust_gain=1.5),
    start="general-4",
    task="digits-torch",
    horizon=100,
    meta_steps=40,
    meta_lr=3e-3,
    meta_lr_final=3e-4,
    tasks_per_meta_step=4,
    pairs=4,
    sigma=0.03,
    validation_tasks=8,
    validation_every=20,
)
