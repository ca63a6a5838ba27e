"""The compiled step against the pure form, which it must equal up to rounding."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_states, random_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, kernels
from learned_optim.kernels import _build, _library
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

ROOT = Path(__file__).parent.parent
COMPILED = kernels.status().startswith("compiled")
needs_kernel = pytest.mark.skipif(not COMPILED, reason=f"no compiled kernel: {kernels.status()}")
needs_compiler = pytest.mark.skipif(not _build.compilers(), reason="no C++ compiler on the path")

#: Deviations allowed after a few steps, in units of the tensor's scale: rounding of float32, or of
#: the parameter's or the state's own type.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def horizon_rule(dtype: torch.dtype = torch.float32, config: int = 0) -> HorizonRule:
    rule = random_rule("horizon", dtype, config)
    assert isinstance(rule, HorizonRule)
    return rule.requires_grad_(False)


def pure_step_(rule: HorizonRule, *arguments: Any, **keywords: Any) -> None:
    """The step that the rule inherits."""
    UpdateRule.step_(rule, *arguments, **keywords)


def kernel_step_(
    rule: HorizonRule, params: list[Tensor], grads: list[Tensor], states: Any, **keywords: Any
) -> bool:
    """The kernel alone."""
    return kernels.step_(
        rule._network(), params, grads, states, config=rule._kernel_config(), **keywords
    )


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def state_copies(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in state.items()} for state in states]


def problem(
    shapes: list[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    params = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    return [p.to(dtype) for p in params], [g.to(dtype) for g in grads]


SHAPES = st.one_of(
    st.sampled_from([(), (0,), (0, 3), (1,), (7, 1), (1, 1), (17,), (5, 3, 3), (1025,), (70, 70)]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 3000)),
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shapes": draw(st.lists(SHAPES, min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 10**6)),
        "dtype": draw(st.sampled_from([torch.float32, *TOLERANCE])),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "config": draw(st.integers(0, 1)),
        "steps": draw(st.integers(1, 5)),
        "ages": draw(st.lists(st.sampled_from([0, 1, 7, 300]), min_size=4, max_size=4)),
        "scale": draw(st.sampled_from([1e-12, 1e-4, 1.0, 1e6])),
        "kind": draw(st.sampled_from(["noise", "noise", "drift", "sparse", "zero", "broken"])),
        "keywords": {
            "total_steps": draw(st.sampled_from([None, None, 3, 20, 1000, 10**5])),
            "lr": draw(st.sampled_from([1.0, 0.1, 2.0])),
            "maximize": draw(st.booleans()),
            "warmup": draw(st.sampled_from([0, 0, 3, 100])),
        },
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 30.0])),
    }


def grads_of(
    case: dict[str, Any], params: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    found = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        if case["kind"] == "drift":
            grad = grad + 2
        elif case["kind"] == "sparse":
            grad = grad * (torch.rand(param.shape, generator=generator) < 0.1)
        elif case["kind"] == "zero":
            grad = grad * (torch.rand((), generator=generator) < 0.3)
        elif case["kind"] == "broken":
            bad = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
            where = torch.rand(param.shape, generator=generator) < 0.2
            pick = torch.randint(4, param.shape, generator=generator)
            grad = torch.where(where, bad[pick], grad)
        found.append((grad * case["scale"]).to(param.dtype))
    return found


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    got, want = got.double(), want.double()
    unit = want.abs().clamp(min=1)
    worst = ((got - want).abs() / unit).max() if got.numel() else torch.zeros(())
    assert worst <= tolerance, f"{what}: {worst}"


@needs_kernel
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), oracle=st.sampled_from([torch.float32, torch.float64]))
def test_equals_the_pure_form(case: dict[str, Any], oracle: torch.dtype) -> None:
    if case["kind"] not in ("noise", "drift"):
        # The float32 form recovers the momenta before a gradient by subtraction. Where they were
        # zero it correlates rounding errors; the kernel and float64 do not.
        oracle = torch.float64
    generator = torch.Generator().manual_seed(case["seed"])
    rule, exact = horizon_rule(config=case["config"]), horizon_rule(torch.float64, case["config"])
    exact.load_state_dict(rule.state_dict())
    reference = exact if oracle is torch.float64 else rule
    params, _ = problem(case["shapes"], case["seed"], case["dtype"])
    state_dtype = case["state_dtype"]
    states = fresh_states(rule, params)
    for state, age in zip(states, case["ages"], strict=False):
        for key in ("fast", "slow", "square"):
            state[key] = state[key].to(state_dtype)
        # A past, so that tensors of different ages meet in one call.
        for _ in range(min(age, 2)):
            index = next(i for i, s in enumerate(states) if s is state)
            past = grads_of({**case, "kind": "noise"}, params[index : index + 1], generator)
            pure_step_(rule, params[index : index + 1], past, [state])
        state["step"].fill_(age)
    if oracle is torch.float64:
        expected_params = [param.to(oracle, copy=True) for param in params]
        expected = [
            {k: v.to(v.dtype if k == "step" else oracle, copy=True) for k, v in state.items()}
            for state in states
        ]
    else:
        expected_params, expected = copies(params), state_copies(states)
    keywords = case["keywords"]
    for _ in range(case["steps"]):
        grads = grads_of(case, params, generator)
        assert kernel_step_(
            rule, params, grads, states, decay=1e-3 * case["weight_decay"], **keywords
        )
        cast = [grad.to(param.dtype) for grad, param in zip(grads, expected_params, strict=True)]
        pure_step_(
            reference, expected_params, cast, expected,
            weight_decay=case["weight_decay"], **keywords,
        )  # fmt: skip
    tolerance = TOLERANCE[case["dtype"]]
    if state_dtype is torch.bfloat16:
        tolerance = max(tolerance, 3e-2)
    for index, (state, wanted) in enumerate(zip(states, expected, strict=True)):
        assert state["step"] == wanted["step"]
        for key in ("fast", "slow", "square"):
            size = wanted[key].abs().max().item() if wanted[key].numel() else 0.0
            floor = max(size, 1e-37)
            assert_near(state[key] / floor, wanted[key] / floor, tolerance, f"{key} of {index}")
        assert_near(state["stats"], wanted["stats"], 10 * tolerance, f"stats of {index}")
        assert_near(
            10 * params[index].double(),
            10 * expected_params[index].double(),
            tolerance,
            f"parameter {index}",
        )
