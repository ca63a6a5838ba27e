"""Diagnostics of a step, held against what the parameters did."""

import copy
import math
from typing import Any

import pytest
import torch
from compat.common import flat, small_batch, small_net, step_with
from conftest import random_rule
from torch import nn

from learned_optim import LearnedOptimizer
from learned_optim._tensors import init_scale
from learned_optim.rules import rule_names
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

SHIPPED = ("eigenbasis", "diagonal", "coordinatewise", "mnist")


def backward(model: nn.Module, seed: int) -> None:
    x, y = small_batch(seed)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def rms(value: torch.Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def trained(rule: Any, steps: int, **options: Any) -> tuple[nn.Module, LearnedOptimizer]:
    model = small_net()
    optimizer = LearnedOptimizer(model.parameters(), rule, **options)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return model, optimizer


def diagnosed(model: nn.Module, optimizer: LearnedOptimizer, seed: int) -> list[dict[str, Any]]:
    """A step of which the optimizer reports."""
    optimizer.diagnose()
    backward(model, seed)
    optimizer.step()
    return [*optimizer.diagnostics().values()]


@pytest.mark.parametrize("name", [*SHIPPED, *rule_names()])
@pytest.mark.parametrize("steps", [0, 5])
def test_numbers_are_those_of_the_step(name: str, steps: int) -> None:
    rule = name if name in SHIPPED else random_rule(name)
    model, optimizer = trained(rule, steps, warmup=0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    found = diagnosed(model, optimizer, steps)
    assert list(optimizer.diagnostics()) == ["0/0", "0/1", "0/2", "0/3"]
    for old, param, numbers in zip(before, model.parameters(), found, strict=True):
        moved = param.detach() - old
        assert numbers["step"] == steps
        assert numbers["step_rms"] == pytest.approx(rms(moved), rel=1e-5)
        assert numbers["param_rms"] == pytest.approx(rms(old), rel=1e-5)
        assert numbers["grad_rms"] == pytest.approx(rms(param.grad), rel=1e-5)
        assert numbers["step_ratio"] == pytest.approx(rms(moved) / rms(old), rel=1e-5)
        along = -float((param.grad * moved).sum())
        lr = along / float(param.grad.square().sum())
        assert numbers["effective_lr"] == pytest.approx(lr, rel=1e-4, abs=1e-7)
        parts = [value for key, value in numbers.items() if key.startswith("part/")]
        # The directions' parts span the step, which is their sum.
        assert not parts or numbers["step_rms"] <= sum(parts) * (1 + 1e-4)
        if len(parts) == 1:
            assert parts[0] == pytest.approx(numbers["step_rms"], rel=1e-3)


def test_parts_of_rotated_matrices_are_those_of_the_eigenbasis() -> None:
    """Of a rule that steps along the gradient alone, further where a matrix is rotated."""
    rule = HorizonRule(HorizonConfig(eigenbasis=True))
    with torch.no_grad():
        rule.readout.bias[1] = -2 * math.atanh(0.5)  # no fast momentum
        rule.readout.bias[3] = 1.0  # the gradient
        rule.direct.weight[0, -1] = 1.0  # a longer step of rotated matrices
    for numbers in diagnosed(*trained(rule, 4), 4):
        assert numbers["part/gradient"] == pytest.approx(numbers["step_rms"], rel=1e-4)
        assert numbers["part/fast"] == pytest.approx(0.0, abs=1e-6 * numbers["step_rms"])


def test_signal_share_tells_repetition_from_noise() -> None:
    param = nn.Parameter(0.1 * torch.randn(60, 60))
    for noisy, expected in ((False, 1.0), (True, 0.1 / 1.9)):
        optimizer = LearnedOptimizer([param])
        optimizer.diagnose()
        grad = torch.randn(60, 60)
        for _ in range(100):
            step_with(optimizer, torch.randn(60, 60) if noisy else grad)
        share = optimizer.diagnostics()["0/0"]["signal_share"]
        assert share == pytest.approx(expected, rel=0.1)


def test_gains_of_the_untrained_rule_are_its_schedule_and_scale() -> None:
    rule = HorizonRule()  # its network answers zero
    model, optimizer = trained(rule, 4, total_steps=40)
    scales = [
        max(min(rms(p), 0.1), 0.25 * min(init_scale(p.shape), 0.1)) for p in model.parameters()
    ]
    for scale, numbers in zip(scales, diagnosed(model, optimizer, 4), strict=True):
        gain = 0.1 * numbers["schedule"] * numbers["step_confidence"] * scale
        # The scale is that of the step before.
        assert numbers["gain/fast"] == pytest.approx(gain, rel=0.15)
        assert numbers["part/fast"] == pytest.approx(numbers["step_rms"], rel=1e-2)
        assert [numbers[f"gain/{name}"] for name in ("slow", "gradient", "cautious")] == [0, 0, 0]


def test_recording_changes_no_step_and_copies_record_nothing() -> None:
    (plain, _), (model, optimizer) = trained("diagonal", 6), trained("diagonal", 0)
    for step in range(6):
        diagnosed(model, optimizer, step)
    assert torch.equal(flat(plain), flat(model))
    with pytest.raises(RuntimeError, match="no step has been recorded"):
        copy.deepcopy(optimizer).diagnostics()
    optimizer.diagnose(False)
    with pytest.raises(RuntimeError, match="before optimizer"):
        optimizer.diagnostics()


def test_names_and_tensors_without_a_step() -> None:
    model = small_net()
    names = [name for name, _ in model.named_parameters()]
    optimizer = LearnedOptimizer(model.parameters())
    # What torch 2.6 and later keep of named parameters.
    optimizer.param_groups[0]["param_names"] = names
    optimizer.diagnose()
    backward(model, 0)
    model[2].bias.grad = None
    optimizer.step()
    assert list(optimizer.diagnostics()) == names[:3]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.diagnostics() == {}


def test_half_precision_and_complex_parameters() -> None:
    torch.manual_seed(3)
    params = [
        nn.Parameter(torch.randn(5, 4)),
        nn.Parameter(torch.randn(6, dtype=torch.complex64)),
        nn.Parameter(torch.randn(8).bfloat16()),
    ]
    optimizer = LearnedOptimizer(params, state_dtype=torch.bfloat16)
    optimizer.diagnose()
    before = [param.detach().clone() for param in params]
    step_with(optimizer, *map(torch.randn_like, params))
    found = optimizer.diagnostics()
    assert list(found) == ["0/0", "0/1", "0/2"]
    for old, param, numbers in zip(before, params, found.values(), strict=True):
        moved = param.detach() - old
        moved = torch.view_as_real(moved) if moved.is_complex() else moved.float()
        assert numbers["step_rms"] == pytest.approx(rms(moved), rel=1e-4)
        assert "gain/fast" in numbers
