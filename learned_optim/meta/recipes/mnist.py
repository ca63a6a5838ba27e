"""The thesis's section 4.3: a 784-20-10 sigmoid network on MNIST, log-and-sign gradients.
Three hours.

Sixty epochs instead of the thesis's twenty: single meta-gradients are mostly noise (their mean is
a tenth of their size), so what a cosine to a hundredth and averaged weights gain needs time.
"""

from learned_optim.meta.recipes import Recipe
from learned_optim.rules.lstm import LSTMConfig

RECIPE = Recipe(
    task="mnist",
    rule=LSTMConfig(preprocessing="log_sign", p=10.0, output_scale=0.1),
    epochs=60,
    meta_lr=3e-3,
    meta_lr_final=3e-5,
    coordinates=1000,
    clip_norm=1.0,
    average=0.99,
)
