"""The progress bar of meta-training and evaluation, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable


class ProgressBar:
    """A progress bar over ``(done, total, what)`` reports, on standard error."""

    def __init__(self, title: str) -> None:
        from tqdm import tqdm

        # smoothing=0: the time left follows from the average pace, validation included. The delay
        # hides the bar until there is progress: an error before stands alone.
        interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; updates fill a log file
        self.tqdm = tqdm(
            desc=title, dynamic_ncols=True, mininterval=interval, miniters=0, smoothing=0,
            delay=1e-3,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        self._begun = False

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._show

    def _show(self, done: int, total: int, what: str) -> None:
        if not self._begun or done < self.tqdm.n:
            # The pace of this process predicts the time left; that of earlier ones does not.
            self.tqdm.delay = 0
            self.tqdm.reset(total)
            self.tqdm.initial = self.tqdm.n = self.tqdm.last_print_n = done
            self._begun = True
        self.tqdm.total = total
        self.tqdm.set_postfix_str(what, refresh=False)
        self.tqdm.update(done - self.tqdm.n)

    def __exit__(self, *exc: object) -> None:
        self.tqdm.close()
