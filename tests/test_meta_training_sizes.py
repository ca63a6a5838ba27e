"""The benchmark of meta-training by the size of the optimizee, on a tiny one."""

import pytest

from benchmarks import meta_training_sizes
from benchmarks.meta_training_sizes import METHODS, cost, markdown


@pytest.mark.parametrize("method", METHODS)
def test_cost_of_a_tiny_optimizee(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_training_sizes, "SIZES", {"tiny": (6, 4, 3)})
    found = cost(method, "tiny")
    assert found["parameters"] == 6 * 4 + 4 + 4 * 3 + 3
    assert found["rate"] > 0
    assert found["peak"] >= 0


def test_table() -> None:
    found = {
        size: {
            method: {"rate": rate, "peak": 3 * 2**20, "parameters": parameters}
            for method in METHODS
        }
        for size, rate, parameters in (("small", 1234.5, 15910), ("large", 0.52, 4988710))
    }
    lines = markdown(found).splitlines()
    method = next(iter(METHODS))
    assert lines[2:4] == [f"| {method} | 15,910 | 1,234 | 3 |", "|  | 4,988,710 | 0.5 | 3 |"]
    assert len(lines) == 2 + 2 * len(METHODS)
