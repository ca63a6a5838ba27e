"""The Triton kernels in Triton's interpreter; test_triton.py runs this in a process of its own."""

import argparse
import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from conftest import fresh_states
from test_kernels import (
    compare_with_the_pure_form,
    copies,
    draw_case,
    kernel_step_,
    problem,
    start,
)

from benchmarks import gpu
from learned_optim.kernels import _cpu, _gpu
from learned_optim.rules import StepSettings

SHAPES = [(5, 7), (9, 2), (), (0, 3), (33,), (_gpu.CHUNK + 5,), (2, _gpu.CHUNK)]


triton_step_ = partial(kernel_step_, kernel=lambda *call: _gpu.step_(_cpu.StepCall(*call)))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_has_passed", lambda *_: True)


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_pure_form(seed: int) -> None:
    case = draw_case(seed, SHAPES, tensors=2)
    compare_with_the_pure_form({**case, "steps": min(2, case["steps"])}, triton_step_)


@pytest.mark.usefixtures("no_trial")
def test_the_checks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_cpu = argparse.Namespace(device="cpu")
    gpu.run(on_the_cpu)
    monkeypatch.setattr(gpu, "checks", lambda _: {"float32": 0.9, "float16": math.nan})
    with pytest.raises(SystemExit, match=r"beyond their tolerance: float16$"):
        gpu.run(on_the_cpu)


@pytest.mark.usefixtures("no_trial")
def test_a_rate_on_the_device_is_read_there_and_zero_changes_nothing() -> None:
    rule, params, grads, states = start([(5, 7)])
    assert triton_step_(rule, params, grads, states, lr=torch.tensor(0.0))
    assert torch.equal(params[0], problem([(5, 7)])[0][0])
    assert all(torch.equal(v, fresh_states(rule, params)[0][k]) for k, v in states[0].items())
    other, other_states = copies(params), copy.deepcopy(states)
    assert triton_step_(rule, params, grads, states, lr=torch.tensor(0.5))
    assert triton_step_(rule, other, grads, other_states, lr=0.5)
    assert torch.equal(params[0], other[0])
    assert all(torch.equal(value, other_states[0][key]) for key, value in states[0].items())


@pytest.mark.usefixtures("no_trial")
def test_overlapping_memory_other_dtypes_and_sizes_are_refused() -> None:
    rule, params, grads, states = start([(6,), (6,)])
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
    rule, params, grads, states = start([(5, 7)])
    monkeypatch.setattr(_gpu, "_passed", {})
    assert triton_step_(rule, params, grads, states)  # it passes
    launch = _gpu.launch

    def wrong(kernels: Any, call: Any, settings: StepSettings) -> None:
        launch(kernels, call, settings._replace(maximize=True))

    monkeypatch.setattr(_gpu, "launch", wrong)
    monkeypatch.setattr(_gpu, "_failure", "")
    monkeypatch.setattr(_gpu, "_passed", {})
    before = params[0].clone()
    with pytest.warns(RuntimeWarning, match="went wrong"):
        assert not triton_step_(rule, params, grads, states)
    assert not triton_step_(rule, params, grads, states)  # without a warning, which is an error
    assert torch.equal(params[0], before)
    assert _gpu.loaded()[1].startswith("failed")


def test_a_row_of_addresses_can_be_written_on_the_device() -> None:
    kernels = _gpu.loaded()[0]
    rows = [[0, 2**45 + 16, 1, 2, 3, 4, 5, 6], [7] * 8]
    table = torch.zeros((2, 8), dtype=torch.int64)
    for index, row in enumerate(rows):
        kernels.addresses_kernel[(1,)](table, index, *row)
    assert table.tolist() == rows
