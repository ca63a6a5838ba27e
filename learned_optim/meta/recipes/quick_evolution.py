"""A first meta-training by evolution strategies: `diagonal`, adapted to scikit-learn's digits.

Whole runs of a small network, as `diagonal` was trained on a mixture; nothing is downloaded. On
tasks of your own: `meta_train(task, "quick-evolution", folder=...)`.
"""

from learned_optim.meta.recipes import EvolutionRecipe, diagonal

RECIPE = EvolutionRecipe(
    rule=diagonal.RECIPE.rule,
    start="diagonal",
    task="digits-torch",
    horizon=100,
    meta_steps=40,
    meta_lr=3e-3,
    meta_lr_final=3e-4,
    tasks_per_meta_step=4,
    validation_tasks=8,
    validation_every=20,
)
