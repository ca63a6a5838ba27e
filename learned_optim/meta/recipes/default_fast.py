"""The cheap general-purpose rule: the recipe of ``default``, one network per tensor."""

from dataclasses import replace

from learned_optim.meta.recipes import default
from learned_optim.rules.steered import SteeredConfig

RECIPE = replace(default.RECIPE, rule=SteeredConfig(), coordinates=None)
