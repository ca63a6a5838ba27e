"""Constants of the rule `horizon`: the rule, the C++ and the Triton kernels read them here.

Standard library alone: the build passes every upper-case number to the C++ compiler as ``LO_NAME``.
"""

# ---- moments
FAST_BETA = 0.9  # decay of the fast momentum
SLOW_BETA = 0.99  # decay of the slow momentum
SQUARE_BETA = 0.99  # decay of the mean square, as long as the slow momentum so that it bounds it
LARGEST_RATIO = 3.0  # bound of the gradient in units of its root mean square; momenta need none
TINY = 1e-15  # keeps 0 / 0 at 0: gradients below it count as zero
LARGEST_GRAD = 2.0**48  # larger gradients are cut off: sums of their squares fit into float32

# ---- scale of a tensor
LARGEST_SCALE = 0.1  # a fan-in of a few says nothing about an embedding or an adapter of that width
SMALLEST_SHARE = 0.25  # of what the shape suggests: weights that start at zero have to leave it
SINGLE_SHARE = 0.2  # of tensors of one coordinate: multipliers and temperatures overshoot at 1
BASE_STEP = 0.1  # step of the untrained rule, in units of the scale: best of .01, .03, .1

# ---- network
STEP_BOUND = 3.0  # of the log of the factor on the step
MIX_BOUND = 2.0  # of each direction's share
LARGEST_COUNT = 10000.0  # steps are counted to here: training runs were no longer
SHORT_BETA = 0.9  # decay of the short averages of statistics, ten steps
LONG_BETA = 0.99  # decay of the long ones, a hundred steps

# ---- schedule
WARMUP_SHARE = 0.1  # warm-up in units of the run's length,
SHORTEST_WARMUP = 10.0  # at least so many steps
LONGEST_WARMUP = 250.0  # and at most so many
WARMUP_STEPS = 50.0  # warm-up where the length of the run is unknown
LAST_RATE = 0.01  # the schedule ends here, so that a run that goes on still moves

# ---- step confidence
CONFIDENCE_START = -3.0  # log at the first step, and least log: trained weights survive such steps
CONFIDENCE_GAIN = (
    1.5  # what a correlation of 1 adds to the log: saturated after some agreeing steps
)
UNKNOWN_GAIN = 0.05  # the same once saturated, in runs of unknown length: steps anneal by it alone
KNOWN_GAIN = 0.1  # the same in runs of known length, only upwards
GROWTH_LOSS = 0.4  # of the log, there, per unit of log growth of the gradients,
LEAST_GROWTH = 0.3  # beyond this growth,
LEAST_OPPOSITION = 0.1  # while the mean correlation is below minus this

# ---- weight decay
DECAY_UNIT = 1e-3  # weight decay is in AdamW's units: at lr = 1 as AdamW's at its usual lr
DECAY_POWER = 3.0  # of the schedule: decay is over before the steps are
WEIGHT_DECAY = 1.0  # of users who give none, in runs of known length,
UNDIMINISHED_STEPS = 4000.0  # of up to so many steps; in longer ones inversely proportional


def macros() -> list[str]:
    """Definitions for a C++ compiler."""
    return [f"-DLO_{name}={float(value)!r}" for name, value in globals().items() if name.isupper()]
