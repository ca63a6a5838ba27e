"""`general-7` with shorter steps for the second matrix of low-rank adapters. Minutes.

No training: the weights are validated under the new configuration. Where no matrix starts at zero
that is taller than wide, it is `general-7` to the bit.
"""

from dataclasses import replace

from learned_optim.meta.recipes import general_7
from learned_optim.rules.horizon import HorizonConfig

RECIPE = replace(
    general_7.RECIPE,
    rule=HorizonConfig(
        trust_start=-3.0,
        trust_gain=1.5,
        trust_later_gain=0.05,
        trust_known_gain=0.1,
        trust_margin=0.1,
        trust_growth=4.0,
        weight_decay=1.0,
        decay_power=3.0,
        decay_live=True,
        adapter_power=0.6,
    ),
    start="general-7",
)
