"""`general-4` with a trust that may fall again where the length of the run is unknown. Minutes.

No training: the weights of `general-4` are validated under the new configuration. Where the length
is known, both do the same.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_4
from learned_optim.rules.horizon import HorizonConfig

RECIPE = replace(
    general_4.RECIPE,
    rule=HorizonConfig(trust_start=-3.0, trust_gain=1.5, trust_later_gain=0.05),
    start="general-4",
    meta_steps=0,
)
