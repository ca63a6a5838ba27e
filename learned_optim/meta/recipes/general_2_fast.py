"""The cheap general-purpose rule, trained further: the recipe of ``general-2``.
One to two hours.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_2
from learned_optim.rules.steered import SteeredConfig

RECIPE = replace(
    general_2.RECIPE,
    start="general-fast",
    rule=SteeredConfig(hidden_size=32, square_beta=0.99, direct=True),
    epochs=9,
    coordinates=None,
)
