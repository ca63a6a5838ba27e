"""Search for a meta-learning rate, and for any other field of a recipe, with Optuna.

Every trial is a short run of the recipe, judged by its best validation. By default the space is
the thesis's, a meta-learning rate that is log-uniform in [1e-5, 1]. Trials are in a journal in the
search's folder, which several processes may fill, and which an interrupted search goes on from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock, Timeout

from learned_optim.meta.data import DataOptions
from learned_optim.meta.progress import TrainingError
from learned_optim.meta.recipes import Recipe
from learned_optim.meta.runs import import_modules, modules_of_own_rules
from learned_optim.meta.search_space import Dimension, parse_dimension, with_values
from learned_optim.meta.seeding import seed_of
from learned_optim.meta.trainer import MetaTrainer

if TYPE_CHECKING:
    import optuna

JOURNAL = "search.journal"
LOCK = "search.lock"


@dataclass(frozen=True)
class SearchConfig:
    """Try values of a recipe's fields on short runs; an interrupted search goes on."""

    recipe: Recipe
    folder: Path = Path("runs")
    """The journal of the search, and a run folder for each trial, are in here."""
    trials: int = 8
    """Trials in all, those of earlier processes among them."""
    trial_epochs: int = 2
    """Epochs of each trial."""
    space: tuple[str, ...] = ()
    """Fields and values to try: FIELD=log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or choice:A,B. The
    meta-learning rate is always among them."""
    low: float = 1e-5
    """Smallest meta-learning rate, where `space` does not say."""
    high: float = 1.0
    """Largest meta-learning rate, where `space` does not say."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How values are drawn: at random for ten trials and then where earlier ones did well (Bergstra
    et al. 2011), or always at random, as in the thesis."""
    prune: bool = True
    """End trials early whose validation is worse than the median at the same epoch."""
    workers: int = 1
    """Processes, a trial each at a time."""
    threads: int = 1
    """Threads of torch, for the command; see ``train``."""
    data: DataOptions = field(default_factory=DataOptions)
    """Where data is looked for."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.trial_epochs < 1 or self.workers < 1:
            raise ValueError(
                f"trials, trial_epochs and workers must be at least 1, "
                f"got {self.trials}, {self.trial_epochs} and {self.workers}"
            )
        if not 0.0 < self.low < self.high:
            raise ValueError(f"need 0 < low < high, got low={self.low} and high={self.high}")
        names = [dimension.name for dimension in self.dimensions()]
        if len(set(names)) < len(names):
            raise ValueError(f"space names a field twice: {', '.join(names)}")

    def dimensions(self) -> list[Dimension]:
        """The space that is searched.

        Raises:
            ValueError: an entry of ``space`` that does not fit the recipe.
        """
        found = [parse_dimension(text, self.recipe) for text in self.space]
        if not any(dimension.name == "meta_lr" for dimension in found):
            found.insert(0, Dimension("meta_lr", "log", (self.low, self.high)))
        return found

    def identity(self) -> dict[str, Any]:
        """What all trials of a search share, as JSON-ready data."""
        space = [[d.name, d.kind, [*d.bounds], [*d.choices]] for d in self.dimensions()]
        recipe = {**self.recipe.to_json(), "epochs": None}  # trials have their own
        return {"recipe": recipe, "space": space, "trial_epochs": self.trial_epochs}


@dataclass(frozen=True)
class Trial:
    """What a trial tried and came to.

    Attributes:
        values: by field.
        validation: the best of its epochs; infinite if the run diverged.
        pruned: whether it was ended early.
    """

    values: dict[str, Any]
    validation: float
    pruned: bool = False

    @property
    def meta_lr(self) -> float:
        """The meta-learning rate."""
        rate: float = self.values["meta_lr"]
        return rate


def search(
    config: SearchConfig,
    on_trial: Callable[[Trial], None] | None = None,
    on_run: Callable[[int], None] | None = None,
) -> list[Trial]:
    """Do the trials that the folder lacks, and return all, best first and pruned ones last.

    Args:
        config: what to search.
        on_trial: told every finished trial, those of earlier processes first.
        on_run: told how many optimizee runs of the present trial are done, if there is one worker.

    Raises:
        TrainingError: every trial diverged.
        ValueError: the folder holds another search, or another process searches in it.
        ImportError: there is no Optuna, which the ``search`` extra brings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process searches in {config.folder}: wait for its end, or choose another "
            f"folder. One search takes several processes with --workers"
        ) from error
    try:
        study = _study(config, 0)
        done = _finished(study)
        for trial in done:
            _tell(on_trial, trial)
        _retry_interrupted(study)
        for trial in _do(config, len(done), on_run):
            _tell(on_trial, trial)
        done = _finished(study)
    finally:
        lock.release()
    if all(math.isinf(trial.validation) for trial in done):
        rates = ", ".join(f"{trial.meta_lr:g}" for trial in done)
        raise TrainingError(
            f"every trial diverged (meta-learning rates {rates}): lower --low and --high, or try "
            f"more --trials"
        )
    return sorted(done, key=lambda trial: (trial.pruned, trial.validation))


def _tell(on_trial: Callable[[Trial], None] | None, trial: Trial) -> None:
    if on_trial is not None:
        on_trial(trial)


def _do(config: SearchConfig, done: int, on_run: Callable[[int], None] | None) -> Iterator[Trial]:
    """Do the trials from number ``done`` on, here or in several processes."""
    indices = range(done, config.trials)
    if config.workers == 1:
        for index in indices:
            yield _do_one(config, index, on_run)
        return
    pool = ProcessPoolExecutor(
        min(config.workers, max(1, len(indices))),
        mp_context=get_context("spawn"),
        initializer=_begin_worker,
        initargs=(config.threads, modules_of_own_rules()),
    )
    try:
        futures = [pool.submit(_do_one, config, index) for index in indices]
        for future in as_completed(futures):
            yield future.result()
    finally:  # after an error or an interrupt, what has not begun never does
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int, modules: list[str]) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(threads)
    import_modules(modules)


def _study(config: SearchConfig, index: int) -> optuna.Study:
    """The study in the folder, with a sampler of its own for trial ``index``.

    Raises:
        ValueError: it is of another recipe or space.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    seed = seed_of(config.recipe.seed, "search", index) % 2**32
    if config.sampler == "random":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    else:
        # Trials that run at the same time count as bad ones, lest all be drawn from one place.
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=config.workers > 1)
    pruner = optuna.pruners.MedianPruner() if config.prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(config.folder / JOURNAL))),
        study_name="search",
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    here = json.loads(json.dumps(config.identity()))
    there = study.user_attrs.get("search")
    if there is None:
        study.set_user_attr("search", here)
    elif there != here:
        different = [
            f"{key}: {there[key]} there, {here[key]} here"
            for key in here
            if there[key] != here[key]
        ]
        raise ValueError(
            f"{config.folder} holds another search: choose another --folder, or delete it "
            f"({'; '.join(different)})"
        )
    return study


def _retry_interrupted(study: optuna.Study) -> None:
    """Queue trials that were killed or interrupted again: their run folders go on."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    settled = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
    taken = {trial.user_attrs.get("folder") for trial in trials if trial.state in settled}
    for trial in trials:
        folder = trial.user_attrs.get("folder")
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state not in settled and folder is not None and folder not in taken:
            taken.add(folder)
            study.enqueue_trial(trial.params, user_attrs={"folder": folder})


def _do_one(config: SearchConfig, index: int, on_run: Callable[[int], None] | None = None) -> Trial:
    """Do one trial, of whatever number it gets."""
    study, finished = _study(config, index), []

    def remember(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        finished.append(_as_trial(trial))

    study.optimize(partial(_objective, config, on_run), n_trials=1, callbacks=[remember])
    return finished[0]


def _objective(
    config: SearchConfig, on_run: Callable[[int], None] | None, trial: optuna.Trial
) -> float:
    """Train for a few epochs; the best validation."""
    values = {dimension.name: dimension.suggest(trial) for dimension in config.dimensions()}
    name = trial.user_attrs.get("folder", f"trial-{trial.number}")
    trial.set_user_attr("folder", name)
    trial.set_user_attr("values", values)
    recipe = replace(with_values(config.recipe, values), epochs=config.trial_epochs)
    trainer = MetaTrainer(recipe, config.folder / name, config.data, against_adamw=False)

    def watch(epoch: int, run: int, meta_loss: float) -> None:
        if run == 0 and epoch > 1 and config.prune:
            _prune(trial, epoch - 1, trainer.history[-1].validation)
        if on_run is not None:
            on_run((epoch - 1) * recipe.runs_per_epoch + run + 1)

    with suppress(TrainingError):  # that a rate is too high is a result
        trainer.train(watch)
    return trainer.best.validation if trainer.best else math.inf


def _prune(trial: optuna.Trial, epoch: int, validation: float) -> None:
    import optuna

    trial.report(validation, epoch)
    if trial.should_prune():
        raise optuna.TrialPruned


def _finished(study: optuna.Study) -> list[Trial]:
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return [_as_trial(trial) for trial in study.get_trials(deepcopy=False, states=states)]


def _as_trial(trial: optuna.trial.FrozenTrial) -> Trial:
    from optuna.trial import TrialState

    pruned = trial.state == TrialState.PRUNED
    validation = min(trial.intermediate_values.values()) if pruned else trial.value
    return Trial(trial.user_attrs["values"], math.inf if validation is None else validation, pruned)
