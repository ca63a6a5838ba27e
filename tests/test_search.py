"""Search for meta-learning rates and other fields, with Optuna."""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import SMALL

from learned_optim.cli import main
from learned_optim.meta import MetaTrainer, Recipe
from learned_optim.meta.progress import EpochMetrics, TrainingError
from learned_optim.meta.recipes import recipes
from learned_optim.meta.search import SearchConfig, Trial, search
from learned_optim.meta.search_space import Dimension, parse_dimension, with_values

TINY = replace(SMALL, runs_per_epoch=1, validation_runs=2, tasks_per_meta_step=1, horizon=4)


def pretend(monkeypatch: pytest.MonkeyPatch, validation: Callable[[Any, int], float]) -> None:
    """Trainings that do nothing but have a validation, of a trainer and an epoch."""

    class Pretended:
        def __init__(
            self, recipe: Recipe, folder: Path, data: object, *, against_adamw: bool
        ) -> None:
            assert not against_adamw  # once for every trial
            self.recipe, self.folder = recipe, folder
            self.history: list[EpochMetrics] = []

        best = MetaTrainer.best

        def train(self, on_run: Callable[[int, int, float], None]) -> None:
            for epoch in range(1, self.recipe.epochs + 1):
                on_run(epoch, 0, 1.0)
                figure = validation(self, epoch)
                self.history.append(EpochMetrics(epoch, 1.0, figure, figure, 0, 0.1, 0.0))

    monkeypatch.setattr("learned_optim.meta.search.MetaTrainer", Pretended)


def test_search_ranks_what_training_gives(tmp_path: Path) -> None:
    seen: list[Trial] = []
    config = SearchConfig(SMALL, tmp_path, trials=4, trial_epochs=1)
    trials = search(config, seen.append)
    assert sorted(seen, key=lambda t: t.validation) == trials
    assert len({t.meta_lr for t in trials}) == 4
    assert all(1e-5 <= t.meta_lr <= 1.0 for t in trials)
    best = trials[0]
    alone = replace(SMALL, meta_lr=best.meta_lr, meta_lr_final=best.meta_lr / 10, epochs=1)
    trainer = MetaTrainer(alone, tmp_path / "alone")
    trainer.train()
    assert trainer.best is not None
    assert trainer.best.validation == best.validation
    # Finished trials are read back, not trained again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaTrainer, "_train_run", lambda *_: pytest.fail("trained again"))
        assert search(config) == trials


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_random_rates_are_log_uniform(
    sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first trials, before which there is nothing to learn from."""
    rates = []
    pretend(monkeypatch, lambda self, epoch: 1.0)
    for seed in range(6):
        recipe = replace(TINY, seed=seed)
        config = SearchConfig(recipe, tmp_path / str(seed), trials=8, sampler=sampler)
        rates += [t.meta_lr for t in search(config)]
    logs = torch.tensor(rates).log10()
    # Within three standard errors of 48 draws.
    assert logs.mean().item() == pytest.approx(-2.5, abs=3 * 5 / (12 * 48) ** 0.5)
    assert logs.std().item() == pytest.approx(5 / 12**0.5, rel=0.3)
    assert min(rates) < 1e-4
    assert max(rates) > 0.1


def test_later_trials_learn_from_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the best rate is 1e-3, they are nearer to it, in decades, than the random ones."""
    pretend(monkeypatch, lambda self, epoch: abs(math.log10(self.recipe.meta_lr) + 3))
    decades: list[float] = []
    config = SearchConfig(TINY, tmp_path, trials=30, trial_epochs=1)
    search(config, lambda trial: decades.append(trial.validation))
    assert sum(decades[-10:]) < 0.6 * sum(decades[:10])


def test_any_field_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ("truncation=int:2:6", "clip_norm=choice:null,1.5", "rule.hidden-size=choice:2,4")
    config = SearchConfig(SMALL, tmp_path, trials=6, trial_epochs=1, space=space)
    used: dict[tuple[Any, ...], float] = {}

    def validation(trainer: Any, epoch: int) -> float:
        r = trainer.recipe
        size = r.rule.hidden_size
        used[r.meta_lr, r.truncation, r.clip_norm, size] = float(len(used) + 1)
        assert r.meta_lr_final == pytest.approx(r.meta_lr / 10)
        return used[r.meta_lr, r.truncation, r.clip_norm, size]

    pretend(monkeypatch, validation)
    trials = search(config)
    names = ("meta_lr", "truncation", "clip_norm", "rule.hidden_size")
    assert {tuple(t.values[n] for n in names): t.validation for t in trials} == used
    assert {t.values["rule.hidden_size"] for t in trials} == {2, 4}
    assert all(2 <= t.values["truncation"] <= 6 for t in trials)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (["truncaton=int:2:6"], "cannot change 'truncaton'.*Did you mean 'truncation'"),
        (["rule.hiden_size=int:2:6"], "Did you mean 'rule.hidden_size'"),
        (["epochs=int:2:6"], "cannot change 'epochs'"),
        (["truncation=uniform:2:6"], "no part of a search space: give FIELD=log:LOW:HIGH"),
        (["truncation=int:2"], "no part of a search space"),
        (["meta_lr=log:1:0.1"], "need 0 < low < high in 'meta_lr=log:1:0.1'"),
        (["meta_lr=log:0:0.1"], "need 0 < low < high"),
        (["average=float:0.5:1.5"], r"average must lie in \[0, 1\), got 1.5"),
        (["truncation=float:2:6"], "truncation must be int, got 2.0"),
        (["estimator=choice:replay,guess"], "estimator must be one of"),
        (["meta_lr=log:0.1:1", "meta_lr=log:0.1:1"], "names a field twice: meta_lr, meta_lr"),
    ],
)
def test_bad_spaces(space: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(SMALL, space=tuple(space))


def test_bad_ranges() -> None:
    with pytest.raises(ValueError, match=r"need 0 < low < high, got low=1\.0 and high=0\.1"):
        SearchConfig(SMALL, low=1.0, high=0.1)
    with pytest.raises(ValueError, match="at least 1, got 0, 2 and 1"):
        SearchConfig(SMALL, trials=0)


def test_dimensions_parse() -> None:
    assert parse_dimension("meta-lr=log:1e-4:1", SMALL) == Dimension("meta_lr", "log", (1e-4, 1.0))
    found = parse_dimension("estimator=choice:replay,full", SMALL)
    assert found == Dimension("estimator", "choice", choices=("replay", "full"))
    assert parse_dimension("rule.hidden_size=int:2:8", SMALL).flag == "--hidden-size"
    changed = with_values(SMALL, {"meta_lr": 0.1, "meta_lr_final": 0.05})
    assert (changed.meta_lr, changed.meta_lr_final) == (0.1, 0.05)


def test_bad_trials_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the sixth trial on, what is worse after an epoch than the median ends there."""
    epochs: dict[Path, int] = {}

    def validation(trainer: Any, epoch: int) -> float:
        epochs[trainer.folder] = epoch
        index = int(trainer.folder.name.partition("-")[2])
        return 5.0 if index in (6, 8) else 1.0 - 0.1 * epoch

    pretend(monkeypatch, validation)
    config = SearchConfig(TINY, tmp_path, trials=10, trial_epochs=3, sampler="random")
    trials = search(config)
    assert [t.validation for t in trials if t.pruned] == [5.0, 5.0]
    assert [t.pruned for t in trials[-2:]] == [True, True]
    assert {path.name for path, epoch in epochs.items() if epoch == 1} == {"trial-6", "trial-8"}
    epochs.clear()
    search(replace(config, folder=tmp_path / "all", prune=False))
    assert set(epochs.values()) == {3}


def test_interrupted_trial_goes_on(tmp_path: Path) -> None:
    """With its own values and run folder; the finished ones stay; the end is the same."""
    config = SearchConfig(SMALL, tmp_path / "whole", trials=3, trial_epochs=3, prune=False)
    whole = search(config)
    runs = 0

    def interrupt(done: int) -> None:
        nonlocal runs
        runs += 1
        if runs == 9 + 5:  # in the second trial's second epoch
            raise KeyboardInterrupt

    parts = replace(config, folder=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        search(parts, on_run=interrupt)
    resumed: list[int] = []
    again = search(parts, on_run=resumed.append)
    assert again == whole
    # The second trial begins with its second epoch: 6 runs of it, and 9 of the third.
    assert resumed == [*range(4, 10), *range(1, 10)]


def test_killed_trial_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed leaves its trial running in the journal."""
    from learned_optim.meta import search as module

    config = SearchConfig(SMALL, tmp_path / "whole", trials=2, trial_epochs=1)
    whole = search(config)
    killed = replace(config, folder=tmp_path / "killed")
    killed.folder.mkdir()
    trial = module._study(killed, 0).ask()
    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "__init__", raising(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            module._objective(killed, None, trial)
    assert search(killed) == whole
    assert sorted(p.name for p in killed.folder.glob("trial-*")) == ["trial-0", "trial-2"]


def raising(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def test_more_trials_go_on_and_another_search_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda self, epoch: self.recipe.meta_lr)
    config = SearchConfig(TINY, tmp_path, trials=2)
    first = {t.meta_lr for t in search(config)}
    more = {t.meta_lr for t in search(replace(config, trials=5))}
    assert first < more
    assert len(more) == 5
    with pytest.raises(ValueError, match=r"holds another search.*trial_epochs: 2 there, 3 here"):
        search(replace(config, trial_epochs=3))
    with pytest.raises(ValueError, match=r"holds another search.*'horizon': 4"):
        search(replace(config, recipe=replace(TINY, horizon=8)))


@pytest.mark.slow
def test_workers_do_the_same_trials(tmp_path: Path) -> None:
    config = SearchConfig(TINY, tmp_path / "one", trials=2, trial_epochs=1, sampler="random")
    alone = search(config)
    shared = search(replace(config, folder=tmp_path / "two", workers=2))
    assert shared == alone


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "quadratic", "--folder", str(tmp_path), "--trials", "2"]
    arguments += ["--trial-epochs", "1", "--runs-per-epoch", "1", "--validation-runs", "4"]
    arguments += ["--space", "truncation=int:10:40"]
    torch.set_num_threads(2)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err  # the progress bar: trials
    assert torch.get_num_threads() == 1
    lines = captured.out.splitlines()
    assert len(lines) == 3
    found = re.fullmatch(r"best: --meta-lr (\S+) --truncation (\d+) \(validation \S+\)", lines[-1])
    assert found is not None
    assert 1e-5 <= float(found[1]) <= 1
    assert 10 <= int(found[2]) <= 40
    assert main(["search", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in recipes())
    assert "--trials INT" in shown


def test_without_optuna(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", "quadratic", "--folder", str(tmp_path / "run")]) == 1
    message = "learned-optim: search needs optuna: pip install 'learned-optim[search]'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "run").exists()


def test_progress_within_a_trial(tmp_path: Path) -> None:
    done: list[int] = []
    search(SearchConfig(SMALL, tmp_path, trials=2, trial_epochs=2), on_run=done.append)
    assert done == [1, 2, 3, 4, 5, 6] * 2


def test_diverging_rates_are_results_unless_all_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = MetaTrainer.train

    def diverging(limit: float) -> Callable[..., None]:
        def run(self: MetaTrainer, *args: object) -> None:
            if self.recipe.meta_lr > limit:
                raise TrainingError("epoch 1 taught nothing")
            train(self, *args)  # type: ignore[arg-type]

        return run

    config = SearchConfig(SMALL, tmp_path, trials=4, trial_epochs=1)
    monkeypatch.setattr(MetaTrainer, "train", diverging(0.01))
    trials = search(config)
    assert {t.meta_lr > 0.01 for t in trials} == {True, False}
    assert all((t.validation == float("inf")) == (t.meta_lr > 0.01) for t in trials)
    monkeypatch.setattr(MetaTrainer, "train", diverging(0.0))
    with pytest.raises(TrainingError, match=r"every trial diverged .*--low and --high"):
        search(replace(config, folder=tmp_path / "another"))


def test_one_search_in_a_folder(tmp_path: Path) -> None:
    config = SearchConfig(TINY, tmp_path, trials=1, trial_epochs=1)

    def meanwhile(done: int) -> None:
        with pytest.raises(ValueError, match=f"another process searches in {tmp_path}"):
            search(config)

    search(config, on_run=meanwhile)
