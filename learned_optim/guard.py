"""When not to trust a learned update, judged by the training loss alone.

In the spirit of Premont-Schwarz et al. 2022 (arXiv 2201.12426), who compare the losses that a
learned and a safe optimizer lead to, and of Heaton et al. 2020 (arXiv 2003.01880), who take learned
updates while an averaged bound holds. Here the averaged loss of the one run that there is decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

# Of one loss, at most this many margins count: a window is bad when at least a quarter of it is,
# and one bad batch, or one loss that is NaN, is no fault of the update rule.
MOST_PER_LOSS = 4.0

# An explosion: this many losses in a row, each beyond the best average by so many margins.
EXPLOSION_LOSSES, EXPLOSION_MARGINS = 2, 10.0

# A window's average must exceed the best one's by this many standard errors of their difference:
# the best one is the lowest of many, and losses of neighbouring steps are not independent.
STANDARD_ERRORS = 5.0

# Differences below this part of the first loss are rounding.
RESOLUTION = 2.0**-20

# A loss beyond this counts as infinite, so that squares of losses stay finite.
LARGEST_LOSS = 1e100


@dataclass(frozen=True)
class Guard:
    """Settings of the guard of :class:`~learned_optim.LearnedOptimizer`.

    The learned updates are dropped for Adam's (Kingma and Ba 2015) when

    - the loss *rises*: its average over ``window`` steps exceeds that of the best window by five
      standard errors plus ``tolerance`` times the progress since the first loss; or
    - the loss *explodes*: two in a row are not finite, or exceed that bound ten times over (before
      the first window ends: eleven times the first loss); or
    - the loss *stalls*: its average over ``patience`` steps is not below that of the ``patience``
      before (at first: not below the first loss).

    Parameters then go back to where the best window ended, and Adam starts with fresh moments and
    takes ``length`` steps. Thereafter the rule gets another try, with fresh state, measured
    against Adam's last window. Until it has lowered the loss for ``patience`` steps, every further
    intervention is twice as long as the one before.

    Args:
        lr: Adam's learning rate at ``lr=1`` of the optimizer, whose lr multiplies it.
        window: steps over which the loss is averaged, at least 2.
        tolerance: the part of the progress made so far that a rise may undo.
        patience: steps in which the rule must lower the average loss; whole windows.
        length: steps of the first intervention, at least a window.

    Raises:
        ValueError: a setting out of its range.
    """

    lr: float = 1e-3
    window: int = 50
    tolerance: float = 0.1
    patience: int = 1000
    length: int = 200

    def __post_init__(self) -> None:
        if not math.isfinite(self.lr) or self.lr <= 0.0:
            raise ValueError(f"Guard needs a positive learning rate for Adam, got lr={self.lr}")
        if not math.isfinite(self.tolerance) or self.tolerance < 0.0:
            raise ValueError(
                f"Guard needs a tolerance of 0 or more, as a part of the progress so far, got "
                f"tolerance={self.tolerance}"
            )
        if self.window < 2:
            raise ValueError(f"Guard needs a window of at least 2 steps, got window={self.window}")
        for name in ("patience", "length"):
            if getattr(self, name) < self.window:
                raise ValueError(
                    f"Guard compares averages over window={self.window} steps, and {name}="
                    f"{getattr(self, name)} is shorter: pass a larger {name} or a smaller window"
                )


class GuardAction(Enum):
    """What the optimizer is to do with the step at hand."""

    LEARNED = "take the learned update"
    SNAPSHOT = "copy the parameters, then take the learned update"
    ADAM = "take Adam's update"
    RESTORE = "reset all state and go back to the copy, without an update"


@dataclass
class GuardState:
    """What a guard has seen, in plain numbers that go into a state dict."""

    steps: int = 0
    interventions: int = 0
    adam_steps: int = 0
    #: Steps left of the intervention at hand; 0 while the rule is trusted.
    remaining: int = 0
    #: Factor by which the next intervention is longer than the first.
    longer: int = 1
    #: The first loss; average and standard deviation of the best window. Before there is one, the
    #: first loss, and the standard deviation of the latest window.
    first: float = math.nan
    best: float = math.nan
    spread: float = math.nan
    #: The window at hand: number of losses, sums of their differences from ``best``, and squared.
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    #: The span of ``patience`` steps at hand: windows, sum of their averages; the last average.
    windows: int = 0
    averages: float = 0.0
    before: float = math.nan
    #: Losses in a row that were as of an explosion.
    explosive: int = 0

    def observe(self, loss: float, guard: Guard) -> GuardAction:
        """Take note of the loss at the present parameters, and decide over their update.

        Args:
            loss: what is minimized.
            guard: the settings.
        """
        self.steps += 1
        if abs(loss) > LARGEST_LOSS:
            loss = math.inf
        if self.remaining:
            return self._under_adam(loss, guard)
        if math.isnan(self.best):
            if not math.isfinite(loss):
                return GuardAction.LEARNED
            self.first = self.best = self.before = loss
            self._add(loss)
            return GuardAction.SNAPSHOT
        return self._under_rule(loss, guard)

    def _under_rule(self, loss: float, guard: Guard) -> GuardAction:
        margin = self._margin(guard)
        explosive = not loss <= self.best + EXPLOSION_MARGINS * margin
        self.explosive = self.explosive + 1 if explosive else 0
        if self.explosive >= EXPLOSION_LOSSES:
            return self._intervene(guard)
        highest = self.best + MOST_PER_LOSS * margin
        loss = min(loss, highest) if math.isfinite(loss) else highest
        self._add(loss)
        # Even if the rest of the window were as good as the best one, its average would not be.
        if self.total > guard.window * margin:
            return self._intervene(guard)
        if self.count < guard.window:
            return GuardAction.LEARNED
        average, spread = self._close_window()
        self.windows += 1
        self.averages += average
        # Where the window ends may itself be bad, and is then no place to go back to.
        improved = average < self.best and loss <= self.best + margin
        if improved:
            self.best, self.spread = average, spread
        elif self.best == self.first:
            self.spread = spread
        if self.windows * guard.window >= guard.patience:
            before, self.before = self.before, self.averages / self.windows
            self.windows, self.averages = 0, 0.0
            if self.before >= before:
                return self._intervene(guard)
            self.longer = 1
        return GuardAction.SNAPSHOT if improved else GuardAction.LEARNED

    def _under_adam(self, loss: float, guard: Guard) -> GuardAction:
        self.remaining -= 1
        if self.remaining < guard.window and math.isfinite(loss):
            self._add(loss)
        if self.remaining:
            self.adam_steps += 1
            return GuardAction.ADAM
        if self.count > 1:
            # Not the best of all times, which the data may have moved out of reach.
            self.best, self.spread = self._close_window()
            self.before = self.best
        self._reset()
        return GuardAction.SNAPSHOT

    def _intervene(self, guard: Guard) -> GuardAction:
        self.interventions += 1
        # The step at hand is lost: its gradient is that of other parameters.
        self.remaining = self.longer * guard.length + 1
        self.longer *= 2
        self._reset()
        return GuardAction.RESTORE

    def _margin(self, guard: Guard) -> float:
        """By how much a window's average may exceed the best before it counts as a rise."""
        if math.isnan(self.spread):
            return abs(self.first)
        if self.best == self.first:  # no window was better, and one loss may have been a lucky one
            margin = 3.0 * self.spread
        else:
            margin = STANDARD_ERRORS * self.spread * math.sqrt(2.0 / guard.window)
            margin += guard.tolerance * max(self.first - self.best, 0.0)
        return max(margin, RESOLUTION * abs(self.first))

    def _add(self, loss: float) -> None:
        self.count += 1
        self.total += loss - self.best
        self.squares += (loss - self.best) ** 2

    def _close_window(self) -> tuple[float, float]:
        """Average and standard deviation of the window's losses; the next one is empty."""
        mean = self.total / self.count
        variance = (self.squares - self.count * mean**2) / (self.count - 1)
        self.count, self.total, self.squares = 0, 0.0, 0.0
        return self.best + mean, math.sqrt(max(variance, 0.0))

    def _reset(self) -> None:
        """Nothing of the window and the span at hand carries over to other updates."""
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.windows, self.averages = 0, 0.0
        self.explosive = 0
