"""`general-4` with a trust that may fall again where the length of the run is unknown. Minutes.

No training: the weights of `general-4` are validated under the new configuration. Where the length
is known, both do the same.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_4

RECIPE = replace(
    general_4.RECIPE,
    rule=replace(general_4.RECIPE.rule, trust_later_gain=0.05),
    start="general-4",
    meta_steps=0,
)
