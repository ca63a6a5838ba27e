"""Constants of the rule `horizon`: the rule, the C++ and the Triton kernels read them here.

Standard library alone: the build passes every upper-case number to the C++ compiler as ``LO_NAME``.
"""

# ---- sizes
NUM_STATS = 14  # entries of `stats`
NUM_INPUTS = 23  # of the network
MOST_UNITS = 1024  # of its hidden layer, in the kernels

# ---- moments
FAST_BETA = 0.9  # decay of the fast momentum
SLOW_BETA = 0.99  # decay of the slow momentum
SQUARE_BETA = 0.99  # decay of the mean square; the slow momentum's, so that it bounds that
LARGEST_RATIO = 3.0  # bound of the gradient in roots of the mean square; momenta need none
TINY = 1e-15  # keeps 0 / 0 at 0: gradients below it count as zero
LARGEST_GRAD = 2.0**48  # larger gradients are cut off: sums of their squares fit into float32

# ---- scale of a tensor
LARGEST_SCALE = 0.1  # of 1 / sqrt(fan-in) too, which is far more for narrow embeddings, adapters
SMALLEST_SHARE = 0.25  # of the scale that the shape suggests: weights at zero have to leave it
SINGLE_SHARE = 0.2  # of the scale, for one coordinate: multipliers and temperatures overshoot at 1
BASE_STEP = 0.1  # step of the untrained rule, in units of the scale: best of .01, .03, .1
LONGEST_STEP = 0.1  # root mean square of a step over that of the parameters: deep plain nets train

# ---- network
STEP_BOUND = 3.0  # of the log of the factor on the step
MIX_BOUND = 2.0  # of each direction's share
LARGEST_COUNT = 10000.0  # steps are counted to here, as meta-training had no longer runs
SHORT_BETA = 0.9  # decay of the short averages of statistics, ten steps
LONG_BETA = 0.99  # decay of the long ones, a hundred steps

# ---- schedule
WARMUP_SHARE = 0.1  # warm-up in units of the run's length,
SHORTEST_WARMUP = 10.0  # at least so many steps
LONGEST_WARMUP = 250.0  # and at most so many
WARMUP_STEPS = 50.0  # warm-up where the length of the run is unknown
LAST_RATE = 0.01  # least value of the cosine, so that a run beyond its length still moves

# ---- step confidence
CONFIDENCE_START = -3.0  # log at the first step, and its minimum: spares trained weights
CONFIDENCE_GAIN = 1.5  # added to the log per unit of correlation, until it has reached 0
UNKNOWN_GAIN = 0.05  # the same afterwards in runs of unknown length, which nothing else anneals
KNOWN_GAIN = 0.1  # the same afterwards in runs of known length, for positive correlations only
GROWTH_LOSS = 0.4  # taken from the log there per unit of log growth of the gradients,
LEAST_GROWTH = 0.3  # beyond this growth,
LEAST_OPPOSITION = 0.1  # while the mean correlation is below minus this

# ---- weight decay
DECAY_UNIT = 1e-3  # at lr = 1 weight decay is that of AdamW at its usual learning rate
DECAY_POWER = 3.0  # of the schedule, so that decay ends before the steps do
WEIGHT_DECAY = 1.0  # if the user sets none, in runs of known length
UNDIMINISHED_STEPS = 4000.0  # in longer runs weight decay is divided by length / 4000
