"""What one untuned run is worth, and the comparison on a task of one's own."""

import math
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from learned_optim.evaluation import compare, plot_worth, worth
from learned_optim.evaluation.figures import final_loss
from learned_optim.evaluation.statistics import worth_by_group


def test_worth_by_hand() -> None:
    """Of rates with the losses 4, 2 and 1, one of each kind in the pairs: 7/3, 4/3, 1."""
    found = worth({"a": 1.5}, {"a": [4.0, 1.0, 2.0]})
    assert found["mean"] == pytest.approx([7 / 4.5, 4 / 4.5, 1 / 1.5])
    # From 14/9 at one run to 8/9 at two: 1 is five sixths of the way.
    assert found["equals"] == pytest.approx(1 + 5 / 6)
    assert (found["tasks"], found["low"]) == (1, [None] * 3)


def test_worth_over_tasks() -> None:
    """Geometric means; a diverged run counts ten times the untuned one, whatever it reached."""
    tuning = {"a": [2.0, 2.0], "b": [math.inf, 0.5], "c": [1.0, 1.0]}
    found = worth({"a": 1.0, "b": 1.0, "c": math.inf, "d": 1.0}, tuning)
    assert found["mean"] == pytest.approx([(2.0 * 5.25) ** 0.5, 1.0])
    assert (found["equals"], found["tasks"]) == (pytest.approx(2.0), 2)
    # Two tasks, resampled, are either one twice with a chance of a quarter each.
    assert (found["low"][0], found["high"][0]) == pytest.approx((2.0, 5.25))
    assert worth({"a": 3.0}, tuning)["equals"] == 0.0  # a single run is already better
    assert worth({"a": 1.0}, tuning)["equals"] is None  # ahead of the best of all
    assert worth({"c": math.inf}, tuning) is None


def test_worth_by_group_and_its_picture(tmp_path: Path) -> None:
    losses = {"char-lm-gru": 1.0, "regression": 2.0, "adversarial-pair": 1.0}
    found = worth_by_group(losses, {task: [3.0, 1.2] for task in losses})
    assert {group: result["tasks"] for group, result in found.items()} == {
        "all": 3, "language": 1, "tables": 1,
    }  # fmt: skip
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_worth({"rule": {"adamw-cosine": found}}, tmp_path / "worth.svg")
    text = f"one run equals the best of {found['all']['equals']:.1f}"
    assert text in (tmp_path / "worth.svg").read_text()


def batches(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 4, generator=generator)
    return x, x.sum(1, keepdim=True)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four runs, a table and a picture; done again without a run; a rate that diverges is named."""
    made: list[nn.Module] = []

    def make_model() -> nn.Module:
        made.append(nn.Linear(4, 1))
        return made[-1]

    def test(model: nn.Module) -> dict[str, float]:
        return {"held-out": loss(model, batches(torch.Generator().manual_seed(5))).item()}

    def again() -> object:
        return compare(
            make_model, lambda: batches, loss, 40, test=test, name="sum", lrs=(1e-2, 0.1, 1e30),
            checkpoint="quadratic", output=tmp_path,
        )  # fmt: skip

    found = again()
    printed = capsys.readouterr()
    assert "sum: 4 of 4 runs" in printed.err
    assert str(found) in printed.out
    assert final_loss(found.rivals[0.1]) < final_loss(found.rivals[1e-2])
    assert found.learned.test["held-out"] < 1.0
    assert re.search(r"\| AdamW, lr 1e\+30 \| diverged \|", printed.out)
    assert (tmp_path / "sum.png").read_bytes().startswith(b"\x89PNG")
    count = len(made)
    assert str(again()) == str(found)
    assert len(made) <= count + 4  # a look at the task, and no training
    with pytest.raises(ValueError, match=r"under other conditions .*give another output or name"):
        compare(lambda: nn.Linear(4, 1, bias=False), lambda: batches, loss, 40, name="sum",
                output=tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="needs steps and learning rates, got 0 and"):
        compare(make_model, lambda: batches, loss, 0, output=tmp_path)
