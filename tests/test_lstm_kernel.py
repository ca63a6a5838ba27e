"""The compiled step of LSTM stacks against the differentiable sequence and the pure form."""

import math
import random
from unittest.mock import Mock

import pytest
import torch
from conftest import fresh_states, random_rule, test_configs
from test_kernels import UNSUITABLE, copies, from_inference, is_readable, needs_kernel, problem
from torch import Tensor

from learned_optim import kernels
from learned_optim.meta.seeding import torch_threads
from learned_optim.rules import StepSettings, rule_names
from learned_optim.rules._lstm import LSTMStack

#: Rounding of float32 after a step; states are of order 1, and steps of rules a tenth of it.
TOLERANCE = 2e-6
#: Registered rules that hold a stack of LSTM layers, and their configurations.
RULES = [
    (name, config)
    for name in rule_names()
    for config in range(len(test_configs(name)))
    if any(isinstance(part, LSTMStack) for part in random_rule(name, config=config).modules())
]
#: How a matrix lies in memory.
LAYOUTS = ("columns", "rows", "part of columns", "every other row")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Equal values, ``(n, k)``, in another place."""
    n, k = values.shape
    if layout == "columns":
        return values.t().contiguous().t()
    if layout == "rows":
        return values.clone()
    if layout == "part of columns":
        memory = torch.zeros(k, n + 7).t()[3 : n + 3]
    else:
        memory = torch.zeros(k, 2 * n).t()[::2]
    return memory.copy_(values)


def step_(stack: LSTMStack, x: Tensor, hidden: Tensor, cell: Tensor) -> bool:
    return kernels.lstm_step_(x, hidden, cell, stack.weights(), stack.num_layers)


@needs_kernel
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 63, 64, 65, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_sequence_in_float64(n: int, layout: str) -> None:
    rng = random.Random(f"{n} {layout}")
    inputs, units, layers = rng.randint(1, 20), rng.randint(1, 24), rng.randint(1, 3)
    stack = LSTMStack(inputs, units, layers).requires_grad_(False)
    for weight in stack.parameters():
        weight.mul_(rng.choice([1.0, 3.0]))
    x = laid_out(rng.choice([1e-3, 1.0, 50.0]) * torch.randn(n, inputs), rng.choice(LAYOUTS))
    hidden = laid_out(torch.rand(n, layers * units) * 2 - 1, layout)
    cell = laid_out(2 * torch.randn(n, layers * units), rng.choice(LAYOUTS))
    exact = LSTMStack(x.shape[1], stack.hidden_size, stack.num_layers).double()
    exact.load_state_dict(stack.state_dict())
    before = {"hidden": hidden.double(), "cell": cell.double()}
    with torch.no_grad():
        _, after = exact.sequence(x.double().unsqueeze(0), before)
    assert step_(stack, x, hidden, cell)
    unit = before["cell"].abs().clamp(min=1)
    # Inputs of fifty round to 4e-6 before a gate sees them.
    tolerance = TOLERANCE * max(1.0, float(x.abs().max()) / 4 if len(x) else 0.0)
    assert ((cell.double() - after["cell"]).abs() <= tolerance * unit).all()
    assert ((hidden.double() - after["hidden"]).abs() <= tolerance * unit).all()


@needs_kernel
def test_what_is_not_finite_stays_in_its_row() -> None:
    stack = LSTMStack(2, 5, 2).requires_grad_(False)
    x, hidden, cell = torch.randn(70, 2), torch.rand(70, 10), torch.randn(70, 10)
    broken = [tensor.clone() for tensor in (x, hidden, cell)]
    rows = torch.tensor([0, 13, 69])
    broken[0][rows[0], 1] = math.nan
    broken[1][rows[1], 0] = math.nan
    broken[2][rows[2], 3] = math.nan
    assert step_(stack, *broken)
    assert step_(stack, x, hidden, cell)
    others = torch.ones(70, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(broken[1][others], hidden[others])
    assert torch.equal(broken[2][others], cell[others])
    assert broken[2][rows].isnan().any(1).all()


@needs_kernel
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    stack, results = LSTMStack(15, 16, 1).requires_grad_(False), []
    x, start = torch.randn(15, 20_011).t(), torch.randn(16, 20_011)
    for threads in (1, 2, 7):
        hidden, cell = start.clone().t(), start.clone().t()
        with torch_threads(threads):
            assert step_(stack, x, hidden, cell)
        results.append((hidden, cell))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@needs_kernel
@pytest.mark.parametrize(("name", "config"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rules_take_the_same_steps_without_it(
    name: str, config: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = random_rule(name, config=config).requires_grad_(False)
    start, grads = problem([(), (0,), (7, 1), (5, 3, 3), (90, 101)], dtype=dtype)
    grads[3].view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    numbers = StepSettings(0.1, 10.0, maximize=True, warmup=3, loss=torch.tensor(0.5))
    kernel, found = Mock(wraps=kernels.lstm_step_), []
    for step in (kernel, lambda *_: False):
        monkeypatch.setattr(kernels, "lstm_step_", step)
        params = copies(start)
        states = fresh_states(rule, params)
        for _ in range(2):
            rule.step_(params, grads, states, numbers)
        found.append((params, states))
    assert kernel.called
    # Where a value lies on the border, rounding to half precision takes the other side.
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


# ---- what the kernel leaves to the pure form


OF_ALL = {
    **UNSUITABLE,
    "sparse": lambda t: t.to_sparse(),
    "rows": lambda t: t[:-1].clone(),
    "columns": lambda t: t[:, :-1].clone(),
    "dimensions": lambda t: t.unsqueeze(0),
}
OF_STATES = {
    "inference": lambda t: from_inference(t.numel()).view_as(t),
    "one row for all": lambda t: t[:1].expand(t.shape),
    "overlapping rows": lambda t: torch.zeros(100).as_strided(t.shape, (3, 1)),
}


@needs_kernel
@pytest.mark.filterwarnings("ignore:The given buffer")
@pytest.mark.parametrize("which", range(3))
def test_refuses(which: int) -> None:
    stack = LSTMStack(3, 5, 2).requires_grad_(False)
    for what, change in (OF_ALL | OF_STATES if which else OF_ALL).items():
        tensors = [torch.ones(6, 3), torch.ones(6, 10), torch.ones(6, 10)]
        tensors[which] = change(tensors[which])
        plain = [tensor for tensor in tensors if is_readable(tensor)]
        before = copies(plain)
        assert not step_(stack, *tensors), what
        assert all(map(torch.equal, plain, before)), what


@needs_kernel
def test_refuses_shared_memory_foreign_weights_and_modes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    stack = LSTMStack(3, 5, 2).requires_grad_(False)
    x, hidden, cell = torch.ones(6, 3), torch.ones(6, 10), torch.ones(6, 10)
    both = torch.ones(6, 20)
    assert not step_(stack, x, hidden, hidden)
    assert not step_(stack, hidden[:, :3], hidden, cell)
    assert not step_(stack, x, both[:, :10], both[:, 10:])
    weights = stack.weights()
    swaps = ((0, torch.ones(20, 4)), (5, torch.ones(20, 6)), (7, torch.ones(19)))
    wrong = [[*weights[:place], weight, *weights[place + 1 :]] for place, weight in swaps]
    wrong += [weights[:4], [w.double() for w in weights], [w.t() for w in weights]]
    assert not any(kernels.lstm_step_(x, hidden, cell, own, 2) for own in wrong)
    wide = LSTMStack(1, 1025, 1).requires_grad_(False)
    assert not step_(wide, torch.ones(1, 1), torch.ones(1, 1025), torch.ones(1, 1025))
    with FakeTensorMode():
        assert not step_(stack, x, hidden, cell)
    taken = torch.func.vmap(lambda y: y + step_(stack, x, hidden, cell))(torch.zeros(2))
    assert not taken.any()
    assert (hidden == 1).all()
    assert step_(stack, x, hidden, cell)
    assert hidden._version == cell._version == 1
