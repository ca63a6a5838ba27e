"""``torch.compile(opt.step)``: one graph, no break, no recompilation, the numbers of eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.testing import assert_close

from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonRule

from .common import TRAINED, flat, make_rule

STEPS = 50


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountingBackend:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self._compile = lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return self._compile(graph, inputs)


def run(
    rule: UpdateRule,
    backend: CountingBackend | None,
    lr: float | Tensor,
    steps: int = STEPS,
    **settings: Any,
) -> tuple[Tensor, LearnedOptimizer]:
    """Steps with a learning rate that changes in every one; a tensor is 0 in every third.

    The gradients are drawn rather than computed: in training, a trained rule amplifies the last
    bits in which compiled arithmetic differs.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    opt = LearnedOptimizer(model.parameters(), rule, lr=lr, **settings)
    step = opt.step if backend is None else torch.compile(opt.step, backend=backend, fullgraph=True)
    for i in range(steps):
        value = 0.0 if i % 3 == 2 and isinstance(lr, Tensor) else 1.0 - i / (2 * steps)
        if isinstance(lr, Tensor):
            opt.param_groups[0]["lr"].fill_(value)
        else:
            opt.param_groups[0]["lr"] = value
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        step()
    return flat(model), opt


def one_graph_for_ever(
    rule: UpdateRule, state_dtype: torch.dtype | None, rtol: float, atol: float
) -> None:
    settings = {"weight_decay": 0.1, "state_dtype": state_dtype}
    backend = CountingBackend("aot_eager")
    compiled, opt = run(rule, backend, torch.tensor(1.0), **settings)
    assert backend.graphs == 1
    eager, reference = run(rule, None, torch.tensor(1.0), **settings)
    assert_close(compiled, eager, rtol=rtol, atol=atol)
    moved = STEPS - STEPS // 3
    for a, b in zip(opt.state.values(), reference.state.values(), strict=True):
        assert a["step"].item() == b["step"].item() == moved


def test_tensor_lr_is_one_graph_for_ever(rule: UpdateRule) -> None:
    """From the very first step, in which the state is created, and through steps at lr = 0."""
    one_graph_for_ever(rule, None, 2e-5, 1e-5)


@pytest.mark.parametrize("name", ["lstm-descending", "normalized", TRAINED["horizon"]])
def test_half_state_is_one_graph_as_well(name: str) -> None:
    # A last bit can turn the rounding of state to bfloat16, which has 8 bits.
    one_graph_for_ever(make_rule(name), torch.bfloat16, 2e-2, 5e-3)


@pytest.mark.parametrize("name", ["lstm-descending", TRAINED["horizon"]])
def test_float_lr_is_two_graphs_at_most(name: str) -> None:
    """The second graph takes the learning rate as an input, and serves all later values.

    Of rules of either kind of rows: all of them are compiled by the test before.
    """
    rule = make_rule(name)
    backend = CountingBackend("eager")
    compiled, _ = run(rule, backend, 1.0)
    assert backend.graphs <= 2
    eager, _ = run(rule, None, 1.0)
    assert_close(compiled, eager, rtol=2e-5, atol=1e-5)


def test_inductor_gives_eagers_numbers() -> None:
    rule = make_rule("lstm-descending")
    results = []
    for compiled in (False, True):
        param = nn.Parameter(torch.zeros(20))
        opt = LearnedOptimizer([param], rule, lr=torch.tensor(1.0), weight_decay=0.1)
        step = torch.compile(opt.step, fullgraph=True) if compiled else opt.step
        for i in range(20):
            opt.param_groups[0]["lr"].fill_(1.0 - i / 40)
            param.grad = param.detach() - torch.linspace(-1.0, 1.0, 20)
            step()
        results.append(param.detach())
    assert_close(results[1], results[0], rtol=2e-5, atol=1e-5)


def test_an_optimizer_that_has_stepped_or_was_loaded_compiles_too() -> None:
    rule = make_rule("lstm-descending")
    _, opt = run(rule, None, torch.tensor(1.0), steps=2)
    params = opt.param_groups[0]["params"]
    fresh = LearnedOptimizer(params, rule, lr=torch.tensor(1.0))
    fresh.load_state_dict(opt.state_dict())
    backend = CountingBackend("aot_eager")
    step = torch.compile(fresh.step, backend=backend, fullgraph=True)
    for _ in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        step()
    assert backend.graphs == 1
    assert all(state["step"].item() == 7.0 for state in fresh.state.values())


def test_non_finite_gradients_count_as_zero_in_the_graph() -> None:
    results = []
    for bad in (float("nan"), 0.0):
        param = nn.Parameter(torch.ones(4))
        opt = LearnedOptimizer([param], make_rule("adam"))
        step = torch.compile(opt.step, backend="aot_eager", fullgraph=True)
        param.grad = torch.tensor([1.0, bad, -1.0, 0.5])
        step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])


@pytest.mark.skipif(
    not kernels.status().startswith("compiled"), reason=f"no kernel: {kernels.status()}"
)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["state32", "state16"])
def test_the_graph_calls_the_kernel_and_gives_its_bits(
    lr: float | Tensor, dtype: torch.dtype
) -> None:
    calls: list[int] = []

    class Backend(CountingBackend):
        def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            calls.append(sum("horizon_step_" in str(node.target) for node in graph.graph.nodes))
            return super().__call__(graph, inputs)

    settings: dict[str, Any] = {"steps": 6, "state_dtype": dtype, "weight_decay": 1.0}
    rates = [lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2)]
    compiled, opt = run(HorizonRule(), Backend("aot_eager"), rates[0], **settings)
    eager, other = run(HorizonRule(), None, rates[1], **settings)
    assert calls == ([1] if isinstance(lr, Tensor) else [1, 1])
    assert torch.equal(compiled, eager)
    for state, wanted in zip(opt.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(state[key], value) for key, value in wanted.items())


def test_what_the_kernel_does_not_take_is_traced() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4, 6).t())  # not contiguous
    before = param.detach().clone()
    opt = LearnedOptimizer([param], HorizonRule())
    param.grad = torch.randn(6, 4)
    torch.compile(opt.step, backend="aot_eager", fullgraph=True)()
    twin = nn.Parameter(before.clone())
    reference = LearnedOptimizer([twin], HorizonRule())
    twin.grad = param.grad.clone()
    reference.step()
    assert not torch.equal(before, param)
    assert_close(param, twin, rtol=0, atol=1e-6)
