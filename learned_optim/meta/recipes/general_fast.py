"""The cheap general-purpose rule: the recipe of ``general``, one network per tensor.
One to two hours.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general
from learned_optim.rules.steered import SteeredConfig

RECIPE = replace(general.RECIPE, rule=SteeredConfig(), coordinates=None)
