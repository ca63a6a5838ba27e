"""`general-5` with a trust that may fall again where the length of the run is known, too. Minutes.

No training: the weights are validated under the new configuration. Runs longer than those of
training are what it is for: there a step that was long enough can become too long.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_5
from learned_optim.rules.horizon import HorizonConfig

RECIPE = replace(
    general_5.RECIPE,
    rule=HorizonConfig(
        trust_start=-3.0,
        trust_gain=1.5,
        trust_later_gain=0.05,
        trust_known_gain=0.05,
        trust_margin=0.2,
    ),
    start="general-5",
)
