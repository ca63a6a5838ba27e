"""The Triton kernels in Triton's interpreter; test_triton.py runs this in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import fresh_states
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_kernels import (
    TOLERANCE,
    assert_near,
    copies,
    grads_of,
    horizon_rule,
    problem,
    pure_step_,
    state_copies,
)
from torch import Tensor

from learned_optim.kernels import _checks, _trial, triton_step
from learned_optim.kernels._call import StepSettings, StepTensors
from learned_optim.rules.horizon import HorizonRule

SHAPES = [(5, 7), (9, 2), (), (0, 3), (33,), (triton_step.CHUNK + 5,), (2, triton_step.CHUNK)]


def triton_step_(
    rule: HorizonRule, params: list[Tensor], grads: list[Tensor], states: Any, **keywords: Any
) -> bool:
    tensors = StepTensors(
        rule._network(), params, grads, states, lr_scales=keywords.pop("lr_scales", None)
    )
    return triton_step.step_(tensors, StepSettings(rule.kernel_config(), **keywords))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trial, "passed", lambda *_: True)


# The interpreter takes a second for a step: nothing is left for shrinking.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2),
    dtypes=st.lists(st.sampled_from(list(TOLERANCE)), min_size=2, max_size=2),
    half_state=st.booleans(),
    config=st.integers(0, len(HorizonRule.test_configs) - 1),
    at_zero=st.booleans(),
    kind=st.sampled_from(["drift", "broken", "zero"]),
    total=st.sampled_from([None, 3, 1000]),
    maximize=st.booleans(),
    warmup=st.sampled_from([0, 3]),
    weight_decay=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 10**6),
)
@pytest.mark.usefixtures("no_trial")
def test_equals_the_pure_form(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], half_state: bool, config: int,
    at_zero: bool, kind: str, total: int | None, maximize: bool, warmup: int, weight_decay: float,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rule, exact = horizon_rule(config=config), horizon_rule(torch.float64, config)
    exact.load_state_dict(rule.state_dict())
    start = 0.0 if at_zero else 1.0
    params = [start * p.to(d) for p, d in zip(problem(shapes, seed)[0], dtypes, strict=False)]
    states = fresh_states(rule, params)
    for state in states if half_state else []:
        state.update({key: state[key].bfloat16() for key in ("fast", "slow", "square")})
    wanted = [param.to(torch.float64, copy=True) for param in params]
    wanted_states = [
        {k: v.to(v.dtype if k == "step" else torch.float64, copy=True) for k, v in state.items()}
        for state in states
    ]
    keywords: dict[str, Any] = {"lr": 0.7, "maximize": maximize, "warmup": warmup}
    for _ in range(2):
        grads = grads_of({"kind": kind, "scale": 1.0}, params, generator)
        assert triton_step_(
            rule, params, grads, states, decay=1e-3 * weight_decay, total_steps=total or 0.0,
            **keywords,
        )  # fmt: skip
        cast = [grad.double() for grad in grads]
        pure_step_(
            exact, wanted, cast, wanted_states, weight_decay=weight_decay, total_steps=total,
            **keywords,
        )  # fmt: skip
    for index, param in enumerate(params):
        tolerance = max(TOLERANCE[param.dtype], 3e-2 if half_state else 0.0)
        assert_near(10 * param.double(), 10 * wanted[index], tolerance, f"parameter {index}")
        for key, value in wanted_states[index].items():
            # Momenta in units of the largest: they may nearly have cancelled each other out.
            unit = (
                1.0 if key in ("stats", "step") else max([1e-37, *value.abs().flatten().tolist()])
            )
            assert_near(states[index][key] / unit, value / unit, 5 * tolerance, f"{key} of {index}")


@pytest.mark.usefixtures("no_trial")
def test_a_rate_on_the_device_is_read_there_and_zero_changes_nothing() -> None:
    rule = horizon_rule()
    params, grads = problem([(5, 7)])
    states = fresh_states(rule, params)
    assert triton_step_(rule, params, grads, states, lr=torch.tensor(0.0))
    assert torch.equal(params[0], problem([(5, 7)])[0][0])
    assert all(torch.equal(v, fresh_states(rule, params)[0][k]) for k, v in states[0].items())
    other, other_states = copies(params), state_copies(states)
    assert triton_step_(rule, params, grads, states, lr=torch.tensor(0.5))
    assert triton_step_(rule, other, grads, other_states, lr=0.5)
    assert torch.equal(params[0], other[0])
    assert all(torch.equal(value, other_states[0][key]) for key, value in states[0].items())


@pytest.mark.usefixtures("no_trial")
def test_overlapping_memory_other_dtypes_and_sizes_are_refused() -> None:
    rule = horizon_rule()
    params, grads = problem([(6,), (6,)])
    states = fresh_states(rule, params)
    memory = torch.zeros(10)
    for wrong_params, wrong_grads in (
        ([params[0], params[0]], grads),
        ([memory[:6], params[1]], [memory[4:], grads[1]]),
        (params, [grads[0].double(), grads[1]]),
        (params, [grads[0][:5], grads[1]]),
        ([params[0], torch.ones(12)[::2]], grads),
    ):
        assert not triton_step_(rule, wrong_params, wrong_grads, states)
    assert all(state["step"] == 0 for state in states)


def test_a_kernel_that_fails_its_trial_is_not_used_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = horizon_rule()
    params, grads = problem([(5, 7)])
    states = fresh_states(rule, params)
    monkeypatch.setattr(_trial, "_passed", {})
    assert triton_step_(rule, params, grads, states)  # it passes
    launch = triton_step.launch

    def wrong(kernels: Any, call: Any, settings: StepSettings) -> None:
        launch(kernels, call, settings._replace(decay=0.1))

    monkeypatch.setattr(triton_step, "launch", wrong)
    monkeypatch.setattr(triton_step, "_failure", "")
    monkeypatch.setattr(_trial, "_passed", {})
    before = params[0].clone()
    with pytest.warns(RuntimeWarning, match="went wrong"):
        assert not triton_step_(rule, params, grads, states)
    assert not triton_step_(rule, params, grads, states)  # without a warning, which is an error
    assert torch.equal(params[0], before)
    assert triton_step.loaded()[1].startswith("failed")


def test_a_row_of_addresses_can_be_written_on_the_device() -> None:
    kernels = triton_step.loaded()[0]
    assert kernels is not None
    table, rows = torch.zeros((2, 7), dtype=torch.int64), [[0, 2**45 + 16, 1, 2, 3, 4, 5], [7] * 7]
    for index, row in enumerate(rows):
        kernels.addresses_kernel[(1,)](table, index, *row)
    assert table.tolist() == rows


def test_it_is_the_interpreter_that_runs() -> None:
    assert triton_step.INTERPRETED
    assert triton_step.is_here is _checks.is_cpu
