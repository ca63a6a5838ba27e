"""`general-6` with a weight decay of its own, and a trust that falls where gradients grow.
Minutes.

No training: the weights are validated under the new configuration. Without a length of the run it
is `general-5` and `general-6` to the bit.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_6
from learned_optim.rules.horizon import HorizonConfig

RULE = HorizonConfig(
    trust_start=-3.0,
    trust_gain=1.5,
    trust_later_gain=0.05,
    trust_known_gain=0.1,
    trust_margin=0.1,
    trust_growth=4.0,
    weight_decay=1.0,
    decay_power=3.0,
    decay_live=True,
)
RECIPE = replace(general_6.RECIPE, rule=RULE, start="general-6")
