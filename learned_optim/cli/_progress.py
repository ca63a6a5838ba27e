"""Progress on standard error: a bar, and what a meta-training tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learned_optim.meta.trainer import MetaTrainer


class ProgressBar:
    """A progress bar over ``(done, total, what)`` reports, on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Callable[[int, int, str], None]:
        from tqdm import tqdm

        # smoothing=0: time left by the average so far, validation included. A delay keeps the bar
        # from the screen until there is progress, and so off that of an error.
        self.tqdm = tqdm(
            desc=self.title,
            dynamic_ncols=True,
            mininterval=0.5,
            miniters=0,
            smoothing=0,
            delay=1e-3,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._begun = False
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


class TrainingProgress:
    """Shows a training's runs, validation and test in one bar.

    Args:
        trainer: whose progress.
        show: takes ``(done, total, what)``.
    """

    def __init__(self, trainer: MetaTrainer, show: Callable[[int, int, str], None]) -> None:
        self.trainer, self.show = trainer, show
        self.per_epoch = trainer.recipe.runs_per_epoch
        self.total = trainer.recipe.epochs * self.per_epoch
        self.done, self.loss = trainer.epoch * self.per_epoch, ""
        self._tell("starting")

    def on_run(self, epoch: int, run: int, meta_loss: float) -> None:
        self.done = (epoch - 1) * self.per_epoch + run + 1
        self.loss = f"loss {meta_loss:.1f}"
        self._tell(f"epoch {epoch} {self.loss}")

    def report(self, what: str, done: int, total: int) -> None:
        epoch = "" if what == "test" else f"epoch {self.trainer.epoch + 1} "
        self._tell(f"{epoch}{what} {done}/{total}")

    def _tell(self, what: str) -> None:
        from learned_optim.meta.progress import pace_text

        best = self.trainer.best
        said = f"{what} best {best.validation:.2f}" if best else what
        pace = pace_text(self.trainer.pace.per_second, best.ratio_to_adamw if best else None)
        self.show(self.done, self.total, ", ".join([said] + [pace] * bool(pace)))
