"""Shared fixtures: one thread, fixed seeds, and the data folder where there is one."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learned_optim.meta.data import DATA_VARIABLE, DataOptions
from learned_optim.rules import RuleConfig, Segments, State, StepContext, UpdateRule, rule_class

# One thread here and in the processes that tests start: two of them spin where both cores are busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def image_data() -> DataOptions:
    """The real image sets; tests that ask for them are skipped where there are none."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "MNIST").is_dir():
        pytest.skip(f"needs MNIST and others in the folder that ${DATA_VARIABLE} names")
    return DataOptions(Path(folder), download=False)


def test_configs(name: str) -> tuple[RuleConfig, ...]:
    """The configurations that a registered rule wants to be tested with."""
    cls = rule_class(name)
    return cls.test_configs or (cls.Config(),)


test_configs.__test__ = False  # type: ignore[attr-defined]


def random_rule(name: str, dtype: torch.dtype = torch.float32, config: int = 0) -> UpdateRule:
    """A registered rule with seeded weights, large enough to make every part of it matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        rule = rule_class(name)(test_configs(name)[config]).to(dtype)
        with torch.no_grad():
            for weight in rule.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return rule


def context(rule: UpdateRule, step: int, m: int = 1, loss: Tensor | None = None) -> StepContext:
    """The context of ``m`` tensors that were updated ``step`` times."""
    horizon = 100.0 if rule.reads_horizon else None
    return StepContext(torch.full((m,), float(step), dtype=rule.dtype), loss, horizon)


def pack(rule: UpdateRule, states: list[State]) -> State:
    """States of single tensors as one packed state."""
    return {
        key: torch.stack([s[key] for s in states])
        if key in rule.tensor_state
        else torch.cat([s[key].reshape(-1, s[key].shape[-1]) for s in states])
        for key in states[0]
    }


def trajectory(
    rule: UpdateRule, grads: Tensor, param: Tensor, loss: Tensor | None = None
) -> Tensor:
    """Updates of the pure form, of one tensor, over ``grads`` of shape ``(T, *shape)``."""
    segments = Segments([param.shape], dtype=rule.dtype)
    state, updates = pack(rule, [rule.init_state(param)]), []
    param = param.reshape(-1)
    with torch.no_grad():
        for step, grad in enumerate(grads):
            update, new = rule(
                grad.reshape(-1), state, param, segments, context(rule, step, loss=loss)
            )
            state = {**state, **new}
            updates.append(update)
            param = param + update
    return torch.stack(updates).view(grads.shape)


def fresh_states(rule: UpdateRule, params: list[Tensor]) -> list[State]:
    """States as :meth:`UpdateRule.step_` takes them."""
    return [{"step": torch.zeros(()), **rule.init_state(param)} for param in params]
