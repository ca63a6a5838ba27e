"""Random search of the meta-learning rate."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import SMALL

from learned_optim.cli import main
from learned_optim.meta import MetaTrainer
from learned_optim.meta.recipes import recipes
from learned_optim.meta.search import SearchConfig, Trial, search
from learned_optim.meta.trainer import EpochMetrics, TrainingError


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


def test_rates_are_log_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = EpochMetrics(1, 1.0, 1.0, 1.0, 0, 0.1, 0.0)
    monkeypatch.setattr(MetaTrainer, "train", lambda self, on_run: self.history.append(figures))
    trials = search(SearchConfig(SMALL, tmp_path, trials=200))
    logs = torch.tensor([t.meta_lr for t in trials]).log10()
    assert logs.mean().item() == pytest.approx(-2.5, abs=0.35)
    assert logs.std().item() == pytest.approx(5 / 12**0.5, abs=0.2)


def test_bad_ranges() -> None:
    with pytest.raises(ValueError, match=r"need 0 < low < high, got low=1\.0 and high=0\.1"):
        SearchConfig(SMALL, low=1.0, high=0.1)
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        SearchConfig(SMALL, trials=0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "quadratic", "--folder", str(tmp_path), "--trials", "2"]
    arguments += ["--trial-epochs", "1", "--runs-per-epoch", "1", "--validation-runs", "4"]
    torch.set_num_threads(2)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err  # the progress bar: trials
    assert torch.get_num_threads() == 1
    lines = captured.out.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("best: --meta-lr ")
    assert main(["search", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in recipes())
    assert "--trials INT" in shown


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
