"""The results page and its parts, from figures made up here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import light_bench, results_page
from benchmarks.results import GROUPS
from benchmarks.results_page import field_command
from learned_optim.meta.field import TUNED
from learned_optim.meta.field_summary import Figures, summarize
from learned_optim.meta.runs import OptimizerSpec, Run


def field_summary() -> dict[str, Any]:
    """One task: learned 1.0, a rival 2.0, another diverges, the tuned one 0.5."""

    def figures(label: str, kind: Any, final: float) -> Figures:
        run = Run([3.0] * 95 + [final] * 5, 1.0, {"loss": final}, 0.5, 4000)
        return Figures.of(OptimizerSpec(label, kind, label, label), 0.1, 1000, [run, run])

    everybody = {
        "default": figures("default", "learned", 1.0),
        "adam-1e-3": figures("adam-1e-3", "baseline", 2.0),
        "prodigy": figures("prodigy", "baseline", math.inf),
        "adamw-cosine": figures("adamw-cosine", "baseline", 0.5),
    }
    untuned, tuned = ["default", "adam-1e-3", "prodigy"], ["adamw-cosine"]
    protocol = {
        "suite": "field", "quick": True, "checkpoints": {"default": "f"}, "tuned": tuned,
        "untuned": untuned, "skipped": {}, "seeds": 2, "tuning_seeds": 1, "lr_grid": [0.01, 0.1],
    }  # fmt: skip
    effort = {"runs": 10, "hours": 0.5}
    return {"protocol": protocol, "effort": effort, **summarize({"t": everybody}, tuned, untuned)}


def test_page_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "DOCS", tmp_path)
    monkeypatch.setattr(light_bench, "RESULT", tmp_path / "none.json")
    page = results_page.page(GROUPS)
    assert "{" not in page.replace("{1, 3}", "")
    assert page.count("Not measured yet.") >= len(GROUPS) + 8


def test_page_of_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "field-quick.json"
    path.write_text(json.dumps(field_summary(), allow_nan=False))
    page = results_page.page(GROUPS)
    assert "1 task (quick tier), 2 test seeds" in page
    assert "The 10 runs trained for 0.5 hours of one thread." in page
    assert (
        "- `default`, untuned, is ahead of adam-1e-3, prodigy in the geometric mean of final "
        "losses, and behind none. Its final loss is 2.00 times the best tuned rival's, and at "
        "most that rival's on 0 of 1 tasks. It never diverged. It never stalled."
    ) in page
    row = "| t | 1,000 | adamw-cosine (0.1‡) | 2.00 [2.00, 2.00] | 4.00 [4.00, 4.00] | 2 diverged |"
    assert row in page
    # Best of all untuned ones, 2 MB of none: what it costs stands beside it.
    assert "| **default** | 100% | 100% | 100% | 0% | 0% | 0.50 | 0.00 |" in page
    assert "|  | adam-1e-3 | prodigy | adamw-cosine, tuned |" in page
    assert page.count("| **default** | **0.50** | **0.10** | 2.00 |") == 2  # of both sections
    assert (tmp_path / "results" / "field-profile.png").exists()


def test_table_of_light_bench(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    outcomes = {"AdamW at 1e-3": {"trivial": True, "easy": False}, "Prodigy": {"trivial": False}}
    found = {
        "protocol": {"version": "0.1.1", "steps": 5000, "seconds": 20.0},
        "tests": {"beale": outcomes},
        "errors": {"memory": "RuntimeError: no CUDA"},
    }
    path.write_text(json.dumps(found))
    text = light_bench.table(path)
    assert "lightbench 0.1.1, 1 tests, at most 5,000 steps and 20 processor seconds each." in text
    assert "Tests that could not be run: memory." in text
    assert "| AdamW at 1e-3 | 1 of 2 | 1 of 1 | 0 of 1 |" in text


def test_light_benchs_attempts_pass_and_fail() -> None:
    """A square that has to come below 1e-4, within the steps."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.param = nn.Parameter(torch.ones(()))

        def forward(self) -> torch.Tensor:
            return self.param.square()

    test = light_bench.Captured(Square(), None, None, lambda model, loss: (loss < 1e-4, {}))

    def sgd(lr: float) -> light_bench.Make:
        return lambda params, steps: torch.optim.SGD(params, lr=lr)

    assert light_bench.passes(test, sgd(0.25), 100, 60.0)
    assert not light_bench.passes(test, sgd(0.25), 5, 60.0)  # too few steps
    assert not light_bench.passes(test, sgd(3.0), 1000, 60.0)  # diverges
    assert test.model.param.item() == 1.0


def test_cuda_becomes_the_cpu() -> None:
    with light_bench.OnCPU():
        made = (torch.zeros(2, device="cuda"), torch.zeros(2).cuda(), torch.zeros(2).to("cuda"))
        module = nn.Linear(2, 2).cuda()
    assert all(x.device.type == "cpu" for x in (*made, module.weight))


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ({"quick": True, "tuned": ["adamw-cosine"], "seeds": 2}, " --quick"),
        (
            {"quick": True, "tuned": ["muon-cosine"], "untuned": ["default"], "seeds": 2},
            " --quick --tuned muon-cosine --no-untuned",
        ),
        ({"quick": False, "tuned": [*TUNED], "seeds": 3}, ""),
        (
            {"quick": False, "tuned": ["adamw-cosine", "muon-cosine"], "seeds": 2},
            " --tuned adamw-cosine muon-cosine --seeds 2",
        ),
    ],
)
def test_the_page_says_what_was_run(protocol: dict[str, Any], options: str) -> None:
    protocol = {"checkpoints": {"default": "f"}, "untuned": ["default", "adam-1e-3"], **protocol}
    assert field_command(protocol) == f"python -m benchmarks.results field{options}"
