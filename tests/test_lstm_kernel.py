"""The compiled step of LSTM stacks against the differentiable sequence and the pure form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import fresh_states, random_rule, test_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learned_optim import kernels
from learned_optim.rules import StepSettings, rule_names
from learned_optim.rules._lstm import LSTMStack

needs_kernel = pytest.mark.skipif(
    not kernels.status().startswith("compiled"), reason=f"no compiled kernel: {kernels.status()}"
)
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


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    inputs, units = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    n, layers = (
        draw(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 300])),
        draw(st.integers(1, 3)),
    )
    stack = LSTMStack(inputs, units, layers).requires_grad_(False)
    for weight in stack.parameters():
        weight.mul_(draw(st.sampled_from([1.0, 3.0])))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    layouts = st.sampled_from(LAYOUTS)
    return {
        "stack": stack,
        "x": laid_out(scale * torch.randn(n, inputs), draw(layouts)),
        "hidden": laid_out(torch.rand(n, layers * units) * 2 - 1, draw(layouts)),
        "cell": laid_out(2 * torch.randn(n, layers * units), draw(layouts)),
    }


def step_(stack: LSTMStack, x: Tensor, hidden: Tensor, cell: Tensor) -> bool:
    return kernels.lstm_step_(x, hidden, cell, stack.weights(), stack.num_layers)


@needs_kernel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_equals_the_sequence_in_float64(problem: dict[str, Any]) -> None:
    stack, x, hidden, cell = problem.values()
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
def test_activations_are_exact_to_rounding() -> None:
    """tanh relative to itself down to 1e-30, sigmoid relative to itself down to e^-39."""
    z = torch.cat((torch.logspace(-30, 2.5, 4000), torch.linspace(0, 39, 4000)))
    z = torch.cat((z, -z)).unsqueeze(1)
    stack = LSTMStack(1, 1, 1).requires_grad_(False)
    w_ih, w_hh, b_ih, b_hh = stack.weights()
    for weight in (w_hh, b_hh):
        weight.zero_()

    def cell_of(weights: list[float], biases: list[float], start: float) -> Tensor:
        w_ih.copy_(torch.tensor(weights).unsqueeze(1))
        b_ih.copy_(torch.tensor(biases))
        hidden, cell = torch.zeros_like(z), torch.full_like(z, start)
        assert step_(stack, z, hidden, cell)
        return cell.double()

    # Gates in the order of nn.LSTM: input, forget, candidate, output.
    candidate = cell_of([0, 0, 1, 0], [40, -40, 0, 0], 0.0)
    torch.testing.assert_close(candidate, z.double().tanh(), rtol=1e-6, atol=0)
    forget = cell_of([0, 1, 0, 0], [-40, 0, 0, 0], 1.0)
    near = z.abs() <= 39
    torch.testing.assert_close(forget[near], z[near].double().sigmoid(), rtol=1e-6, atol=0)
    assert (forget[z < -39] <= 1e-16).all()
    assert (forget[z > 39] == 1).all()


@needs_kernel
def test_what_is_not_finite_stays_in_its_row() -> None:
    torch.manual_seed(3)
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
    torch.manual_seed(1)
    stack, results = LSTMStack(15, 16, 1).requires_grad_(False), []
    x, start = torch.randn(15, 20_011).t(), torch.randn(16, 20_011)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            hidden, cell = start.clone().t(), start.clone().t()
            assert step_(stack, x, hidden, cell)
            results.append((hidden, cell))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- inside the rules


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    shapes = st.sampled_from([(), (0,), (1,), (7, 1), (17,), (5, 3, 3), (90, 101)])
    return {
        "rule": draw(st.sampled_from(RULES)),
        "shapes": draw(st.lists(shapes, min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 10**6)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "broken": draw(st.booleans()),
        "options": {
            "lr": draw(st.sampled_from([1.0, 0.1])),
            "weight_decay": draw(st.sampled_from([0.0, 10.0])),
            "maximize": draw(st.booleans()),
            "warmup": draw(st.sampled_from([0, 3])),
        },
    }


@contextmanager
def kernel_or_not(used: bool) -> Iterator[list[bool]]:
    """Answers of the kernel, which is called, or takes nothing."""
    calls: list[bool] = []
    known = kernels.lstm_step_

    def step_(*arguments: Any) -> bool:
        calls.append(used and known(*arguments))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "lstm_step_", step_)
        yield calls


@needs_kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(run=runs())
def test_rules_take_the_same_steps_without_it(run: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(run["seed"])
    rule = random_rule(run["rule"][0], config=run["rule"][1]).requires_grad_(False)
    params = [0.1 * torch.randn(s, generator=generator).to(run["dtype"]) for s in run["shapes"]]
    sides = []
    for compiled in (True, False):
        mine, states = [param.clone() for param in params], fresh_states(rule, params)
        for state in states:
            for key in set(rule.state_keys) - set(rule.tensor_state):
                state[key] = state[key].to(run["state_dtype"])
        sides.append((mine, states, compiled))
    for _ in range(2):
        grads = [torch.randn(s, generator=generator).to(run["dtype"]) for s in run["shapes"]]
        if run["broken"]:
            bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).to(run["dtype"])
            for grad in grads:
                grad.view(-1)[:4] = bad[: grad.numel()]
        for mine, states, compiled in sides:
            with kernel_or_not(compiled) as calls:
                numbers = StepSettings(loss=torch.tensor(0.5), **run["options"])
                rule.step_(mine, grads, states, numbers)
            assert calls == [compiled] * len(calls)
            assert calls or not sum(p.numel() for p in mine)
    tolerance = 1e-5
    if torch.bfloat16 in (run["dtype"], run["state_dtype"]):
        tolerance = 2e-2  # where a value lies on the border, rounding takes the other side
    (ours, own, _), (theirs, pure, _) = sides
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(own[i], pure[i], rtol=tolerance, atol=tolerance)


# ---- what the kernel leaves to the pure form


class Subclass(Tensor):
    pass


def misaligned(shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    memory = bytearray(4 * count + 4)
    return torch.frombuffer(memory, dtype=torch.float32, offset=1, count=count).view(shape)


def from_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


UNSUITABLE: dict[str, Any] = {
    "float64": lambda t: t.double(),
    "subclass": lambda t: t.as_subclass(Subclass),
    "meta": lambda t: t.to("meta"),
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape),
    "misaligned": lambda t: misaligned(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "rows": lambda t: t[:-1].clone(),
    "columns": lambda t: t[:, :-1].clone(),
    "dimensions": lambda t: t.unsqueeze(0),
    "negative view": lambda t: torch.view_as_complex(torch.ones(*t.shape, 2)).conj().imag,
}
OF_STATES = {
    "inference": from_inference,
    "one row for all": lambda t: t[:1].expand(t.shape),
    "overlapping rows": lambda t: torch.zeros(100).as_strided(t.shape, (3, 1)),
}


@needs_kernel
@pytest.mark.filterwarnings("ignore:The given buffer")
@pytest.mark.parametrize(
    ("which", "what"),
    [(w, u) for w in range(3) for u in UNSUITABLE] + [(w, u) for w in (1, 2) for u in OF_STATES],
)
def test_refuses(which: int, what: str) -> None:
    stack = LSTMStack(3, 5, 2).requires_grad_(False)
    tensors = [torch.ones(6, 3), torch.ones(6, 10), torch.ones(6, 10)]
    tensors[which] = {**UNSUITABLE, **OF_STATES}[what](tensors[which])
    plain = [t for t in tensors if type(t) is Tensor and t.layout is torch.strided and t.is_cpu]
    before = [t.clone() for t in plain]
    assert not step_(stack, *tensors)
    assert all(map(torch.equal, plain, before))


@needs_kernel
def test_refuses_memory_that_is_shared_and_weights_that_do_not_fit() -> None:
    stack = LSTMStack(3, 5, 2).requires_grad_(False)
    x, hidden, cell = torch.ones(6, 3), torch.ones(6, 10), torch.ones(6, 10)
    both = torch.ones(6, 20)
    assert not step_(stack, x, hidden, hidden)
    assert not step_(stack, hidden[:, :3], hidden, cell)
    assert not step_(stack, x, both[:, :10], both[:, 10:])
    weights = stack.weights()
    for place, weight in ((0, torch.ones(20, 4)), (5, torch.ones(20, 6)), (7, torch.ones(19))):
        wrong = [*weights[:place], weight, *weights[place + 1 :]]
        assert not kernels.lstm_step_(x, hidden, cell, wrong, 2)
    for wrong in (weights[:4], [w.double() for w in weights], [w.t() for w in weights]):
        assert not kernels.lstm_step_(x, hidden, cell, wrong, 2)
    wide = LSTMStack(1, 1025, 1).requires_grad_(False)
    assert not step_(wide, torch.ones(1, 1), torch.ones(1, 1025), torch.ones(1, 1025))
    assert (hidden == 1).all()
    assert step_(stack, x, hidden, cell)
    assert hidden._version == cell._version == 1


@needs_kernel
def test_refuses_under_modes_and_transforms() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    stack = LSTMStack(3, 5, 1).requires_grad_(False)
    tensors = torch.ones(6, 3), torch.ones(6, 5), torch.ones(6, 5)
    with FakeTensorMode():
        assert not step_(stack, *tensors)

    def inside(x: Tensor) -> Tensor:
        assert not step_(stack, *tensors)
        return x

    torch.func.vmap(inside)(torch.ones(2))
