"""State of rules that keep matrices of a tensor: saved, copied, cut with the rows."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from learned_optim import LearnedOptimizer
from learned_optim.rules import State, UpdateRule

from .test_surgery import CUTS, operate


class Preconditioned(UpdateRule):
    """Momentum through the inverse covariances of a matrix's sides, as far as they are short."""

    zero_preserving = True
    coordinatewise = False
    tensor_state = ("count",)
    matrix_state = ("left", "right")
    shortest = 90

    def init_state(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param).unsqueeze(-1), "count": torch.zeros(1)}

    def init_matrices(
        self, shape: torch.Size, device: torch.device, sharded: Sequence[int] = ()
    ) -> State:
        sides = zip(self.matrix_state, shape, strict=False) if len(shape) == 2 else ()
        return {k: torch.eye(n, dtype=torch.float64) for k, n in sides if n <= self.shortest}

    def step_(self, params: Any, grads: Any, states: Any, settings: Any, *_: Any) -> None:
        for param, grad, state in zip(params, grads, states, strict=True):
            state["momentum"].mul_(0.5).add_(grad.unsqueeze(-1))
            step, grad = state["momentum"].squeeze(-1).double(), grad.double()
            if "left" in state:
                state["left"].add_(grad @ grad.t())
                step = torch.linalg.solve(state["left"], step)
            if "right" in state:
                state["right"].add_(grad.t() @ grad)
                step = torch.linalg.solve(state["right"], step.t()).t()
            state["count"] += 1
            state["step"] += 1
            param.sub_(settings.lr * 0.1 * step)


SHAPES = [(20, 3), (3, 20), (80, 4), (100, 95), (70, 70), (5,), ()]


def stepped(shapes: list[tuple[int, ...]] = SHAPES, **settings: Any) -> LearnedOptimizer:
    opt = LearnedOptimizer(
        [Parameter(torch.randn(s)) for s in shapes], Preconditioned(), **settings
    )
    advance(opt, 3)
    return opt


def advance(opt: LearnedOptimizer, steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    (group,) = opt.param_groups
    for _ in range(steps):
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
        opt.step()
    return [param.detach() for param in group["params"]]


def matrices(opt: LearnedOptimizer) -> list[dict[str, tuple[int, ...]]]:
    saved = opt.state_dict()["state"].values()
    return [{k: tuple(s[k].shape) for k in ("left", "right") if k in s} for s in saved]


def test_they_are_saved_once_in_their_own_dtype() -> None:
    opt = stepped(state_dtype=torch.bfloat16)
    assert matrices(opt) == [
        {"left": (20, 20), "right": (3, 3)}, {"left": (3, 3), "right": (20, 20)},
        {"left": (80, 80), "right": (4, 4)}, {}, {"left": (70, 70), "right": (70, 70)}, {}, {},
    ]  # fmt: skip
    for state in opt.state_dict()["state"].values():
        assert state["momentum"].dtype is torch.bfloat16
        assert all(state[key].dtype is torch.float64 for key in ("left", "right") if key in state)


@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_a_resumed_run_equals_an_uninterrupted_one(how: str) -> None:
    opt = stepped()
    if how == "deepcopy":
        twin = copy.deepcopy(opt)
    else:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        params = [Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]]
        twin = LearnedOptimizer(params, Preconditioned())
        twin.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(advance(opt, 3, 1), advance(twin, 3, 1), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", CUTS)
def test_rows_can_be_cut_and_appended(cut: str) -> None:
    """Of matrices only those start anew that no longer fit."""
    opt = stepped([(20, 3)])
    (param,) = opt.param_groups[0]["params"]
    right = opt.state_dict()["state"][0]["right"].clone()
    param = operate(opt, param, CUTS[cut])
    param.grad = torch.zeros_like(param)
    opt.step()
    state = opt.state_dict()["state"][0]
    rows = len(param)
    assert state["step"].item() == 4.0
    assert state["right"].shape == (3, 3)
    if rows != 20:
        assert torch.equal(state["left"], torch.eye(rows, dtype=torch.float64))
    if rows and cut != "reset":
        assert_close(state["right"], right)


def test_a_matrix_that_is_missing_or_does_not_fit_starts_anew() -> None:
    opt = stepped([(20, 3), (5,)])
    saved = opt.state_dict()
    del saved["state"][0]["left"]
    saved["state"][0]["right"] = torch.ones(4, 4)
    saved["state"][1]["left"] = torch.ones(5, 5)  # of a run that rotated this tensor
    fresh = LearnedOptimizer(
        [Parameter(torch.ones(20, 3)), Parameter(torch.ones(5))], Preconditioned()
    )
    fresh.load_state_dict(saved)
    loaded = fresh.state_dict()["state"]
    assert torch.equal(loaded[0]["left"], torch.eye(20, dtype=torch.float64))
    assert torch.equal(loaded[0]["right"], torch.eye(3, dtype=torch.float64))
    assert "left" not in loaded[1]
    advance(fresh, 1)
    assert fresh.state_dict()["state"][0]["step"].item() == 4.0


def test_a_matrix_that_a_tool_took_away_comes_back() -> None:
    opt = stepped([(20, 3)])
    (state,) = opt.state.values()
    del state["right"]
    advance(opt, 1)
    assert matrices(opt) == [{"left": (20, 20), "right": (3, 3)}]
