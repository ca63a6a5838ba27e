"""Preprocessing against values worked out by hand."""

import math

import pytest
import torch

from learned_optim.rules.lstm import log_and_sign


@pytest.mark.parametrize(
    ("grad", "p", "expected"),
    [
        (1.0, 10.0, (0.0, 1.0)),
        (-math.e, 10.0, (0.1, -1.0)),
        (math.exp(-5), 10.0, (-0.5, 1.0)),
        (math.exp(-10), 10.0, (-1.0, 1.0)),  # at the threshold both branches agree
        (-math.exp(-10), 10.0, (-1.0, -1.0)),
        (math.exp(-10) * 1.001, 10.0, ((-10 + math.log(1.001)) / 10, 1.0)),
        (math.exp(-10) * 0.999, 10.0, (-1.0, 0.999)),
        (-math.exp(-12), 10.0, (-1.0, -math.exp(-2))),
        (0.0, 10.0, (-1.0, 0.0)),
        (math.exp(-3), 2.0, (-1.0, math.exp(-1))),
        (1e-300, 10.0, (-1.0, 1e-300 * math.exp(10))),
    ],
)
def test_log_and_sign_by_hand(grad: float, p: float, expected: tuple[float, float]) -> None:
    features = log_and_sign(torch.tensor([grad], dtype=torch.float64), p)
    torch.testing.assert_close(features, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinity_reads_as_the_largest_number(dtype: torch.dtype) -> None:
    infinite = log_and_sign(torch.tensor([math.inf, -math.inf], dtype=dtype))
    largest = torch.finfo(dtype).max
    assert torch.isfinite(infinite).all()
    assert (
        infinite.tolist() == log_and_sign(torch.tensor([largest, -largest], dtype=dtype)).tolist()
    )
    assert infinite[:, 1].tolist() == [1.0, -1.0]


def test_nan_stays_nan() -> None:
    assert torch.isnan(log_and_sign(torch.tensor([math.nan]))).all()


def test_half_precision_does_not_overflow() -> None:
    # exp(p) alone would be infinite in float16 and 0 * inf not a number.
    features = log_and_sign(torch.tensor([0.0, 1e-4], dtype=torch.float16), p=15.0)
    assert torch.isfinite(features).all()
