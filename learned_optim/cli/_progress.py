"""Progress on standard error: a bar."""

from __future__ import annotations

from collections.abc import Callable


class ProgressBar:
    """A progress bar over ``(done, total, what)`` reports, on standard error."""

    def __init__(self, title: str) -> None:
        from tqdm import tqdm

        # smoothing=0: time left by the average so far, validation included. A delay keeps the bar
        # from the screen until there is progress, and so off that of an error.
        self.tqdm = tqdm(
            desc=title, dynamic_ncols=True, mininterval=0.5, miniters=0, smoothing=0, delay=1e-3,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        self._begun = False

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._show

    def _show(self, done: int, total: int, what: str) -> None:
        if not self._begun or done < self.tqdm.n:
            # What earlier processes did says nothing of how long the rest takes.
            self.tqdm.delay = 0
            self.tqdm.reset(total)
            self.tqdm.initial = self.tqdm.n = self.tqdm.last_print_n = done
            self._begun = True
        self.tqdm.total = total
        self.tqdm.set_postfix_str(what, refresh=False)
        self.tqdm.update(done - self.tqdm.n)

    def __exit__(self, *exc: object) -> None:
        self.tqdm.close()
