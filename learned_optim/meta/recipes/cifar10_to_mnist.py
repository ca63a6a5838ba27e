"""Trained on CIFAR-10, tested on MNIST: what carries over from other data. One minute.

A cheap rule and a short training, for a comparison with ``all-but-mnist`` and others of the same
budget.
"""

from learned_optim.meta.recipes._base import Recipe
from learned_optim.rules.steered import SteeredConfig

RECIPE = Recipe(
    task="cifar10-half",
    test_task="mnist",
    rule=SteeredConfig(hidden_size=16, square_beta=0.99),
    epochs=4,
    runs_per_epoch=30,
    horizon=100,
    truncation=20,
    meta_lr=1e-2,
    meta_lr_final=1e-3,
    clip_norm=1.0,
    relative_loss=True,
    average=0.95,
    validation_runs=12,
    validation_mean="geometric",
    test_runs=50,
)
