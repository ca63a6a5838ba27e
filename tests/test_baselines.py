"""Hand-written optimizers: schedules, constants and what is missing."""

import sys

import pytest
import torch

from learned_optim.meta.baselines import (
    BASELINES,
    MuonAdamW,
    make_baseline,
    warmup_cosine,
    warmup_linear,
    why_missing,
)


def descend(name: str, lr: float, steps: int) -> tuple[torch.nn.Parameter, list[float]]:
    """Half a square from 1, and the learning rates that its steps had."""
    param, used = torch.nn.Parameter(torch.ones(2, 2)), []
    optimizer = make_baseline(name, [param], lr, steps)
    optimizer.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * param.square().sum()).backward()
        optimizer.step()
    return param, used


def test_schedules_by_hand() -> None:
    assert [warmup_cosine(x) for x in (0.0, 0.025, 0.05, 0.525, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )
    assert [warmup_linear(x) for x in (0.0, 0.025, 0.05, 0.525, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )
    assert warmup_cosine(0.01, 0.02) == 0.5
    assert warmup_cosine(0.0, 0.0) == 1.0


def test_schedule_sets_the_rate_of_every_step() -> None:
    param, used = descend("sgd-linear", 0.5, 20)
    assert used == pytest.approx([0.5 * warmup_linear((t + 0.5) / 20) for t in range(20)])
    value = 1.0
    for lr in used:
        value *= 1.0 - lr
    assert param[0, 0].item() == pytest.approx(value)
    # More steps than were said: no negative rates.
    optimizer = make_baseline("sgd-cosine", [param], 0.5, 2)
    param.grad = torch.ones_like(param)
    for _ in range(4):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_constant_baselines_keep_their_rate() -> None:
    for name in ("adam", "adam-1e-3", "nesterov"):
        assert descend(name, 0.01, 5)[1] == [0.01] * 5


def test_nadamw_is_nesterovs_adam_with_decay() -> None:
    """Three steps by hand: look-ahead of the first moment, bias corrections, decoupled decay."""
    param = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = BASELINES["nadamw-1.75e-3"].make([param], 0.01, 100)
    theta, m, v, b1, b2 = 1.0, 0.0, 0.0, 0.933, 0.9955
    for t, grad in enumerate((0.5, -1.0, 2.0), start=1):
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * grad / (1 - b1**t)
        theta *= 1 - 0.01 * 0.081
        theta -= 0.01 * ahead / ((v / (1 - b2**t)) ** 0.5 + 1e-8)
        assert param.item() == pytest.approx(theta, rel=1e-6)


def test_muon_has_the_matrices_and_adamw_the_rest() -> None:
    matrix, vector, filters = (
        torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6,), (2, 3, 3, 3))
    )
    optimizer = MuonAdamW([matrix, vector, filters], 0.1)
    muon, adamw = optimizer.parts
    assert muon.param_groups[0]["params"] == [matrix]
    assert adamw.param_groups[0]["params"] == [vector, filters]
    before = matrix.detach().clone()
    for p in (matrix, vector, filters):
        p.grad = torch.randn_like(p)
    optimizer.step()
    # match_rms_adamw: 0.2 lr sqrt(6) times a nearly orthogonal 4x6 matrix, whose RMS is 1/sqrt(6).
    moved = (matrix - before * (1 - 0.1 * 0.1)).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 0.1, rel=0.2)
    assert set(optimizer.state) == {matrix, vector, filters}


def test_every_optional_package_is_in_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    needing = [name for name, found in BASELINES.items() if found.package]
    assert {BASELINES[name].package for name in needing} == {
        "dadaptation", "prodigyopt", "schedulefree",
    }  # fmt: skip
    for name in needing:
        assert why_missing(name) is None
        message = f"the baseline '{name}' needs its package: pip install 'learned-optim[baselines]'"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, str(BASELINES[name].package), None)
            assert why_missing(name) == message
            with pytest.raises(ImportError, match="learned-optim"):
                make_baseline(name, [torch.zeros(1)], 1.0, 10)
