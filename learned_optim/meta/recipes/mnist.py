"""The thesis's section 4.3: a 784-20-10 sigmoid network on MNIST, log-and-sign gradients."""

from learned_optim.meta.recipes._base import Recipe
from learned_optim.rules.lstm import LSTMConfig

RECIPE = Recipe(
    task="mnist",
    rule=LSTMConfig(preprocessing="log_sign", p=10.0, output_scale=0.1),
    epochs=20,
    meta_lr=3e-3,
    coordinates=2000,
)
