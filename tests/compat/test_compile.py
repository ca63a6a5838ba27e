"""``torch.compile(opt.step)``: one graph, no break, no recompilation, the numbers of eager."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.testing import assert_close

from learned_optim import LearnedOptimizer, kernels
from learned_optim.rules import UpdateRule
from learned_optim.rules import _basis as basis
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

from .common import TRAINED, flat, make_rule

STEPS = 50
COMPILED = kernels.status().startswith("compiled")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountingBackend:
    """A backend of torch.compile that counts its graphs, and their calls of the kernel."""

    def __init__(self, name: str) -> None:
        self._compile = lookup_backend(name)
        self.graphs = self.kernels = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        self.kernels += sum("horizon_step_" in str(node.target) for node in graph.graph.nodes)
        return self._compile(graph, inputs)


def run(
    rule: UpdateRule,
    backend: CountingBackend | str | None,
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


@pytest.mark.parametrize(
    ("name", "state_dtype"),
    [(name, None) for name in ("adam", "lstm-descending", "normalized", *TRAINED.values())]
    # A last bit can turn the rounding of state to bfloat16, which has 8 bits.
    + [("lstm-descending", torch.bfloat16), (TRAINED["horizon"], torch.bfloat16)],
)
def test_tensor_lr_is_one_graph_for_ever(name: str, state_dtype: torch.dtype | None) -> None:
    """From the very first step, in which the state is created, and through steps at lr = 0."""
    settings = {"weight_decay": 0.1, "state_dtype": state_dtype}
    backend, rule = CountingBackend("aot_eager"), make_rule(name)
    compiled, opt = run(rule, backend, torch.tensor(1.0), **settings)
    assert backend.graphs == 1
    eager, reference = run(rule, None, torch.tensor(1.0), **settings)
    rtol, atol = (2e-5, 1e-5) if state_dtype is None else (2e-2, 5e-3)
    assert_close(compiled, eager, rtol=rtol, atol=atol)
    moved = STEPS - STEPS // 3
    for a, b in zip(opt.state.values(), reference.state.values(), strict=True):
        assert a["step"].item() == b["step"].item() == moved


@pytest.mark.parametrize(
    ("name", "compiler", "lr", "graphs"),
    # The second graph takes the learning rate as an input, and serves all later values.
    [("lstm-descending", "eager", 1.0, 2), ("adam", "inductor", torch.tensor(1.0), 1)],
)
def test_other_compilers(name: str, compiler: str, lr: float | Tensor, graphs: int) -> None:
    backend, rule = CountingBackend(compiler), make_rule(name)
    compiled, _ = run(rule, backend, lr)
    assert backend.graphs <= graphs
    assert_close(compiled, run(rule, None, lr)[0], rtol=2e-5, atol=1e-5)


def test_a_loaded_optimizer_compiles_and_bad_gradients_count_as_zero() -> None:
    rule = make_rule("adam")
    _, opt = run(rule, None, torch.tensor(1.0), steps=2)
    (weight, bias), results = opt.param_groups[0]["params"], []
    for bad in (float("nan"), 0.0):
        params = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]
        fresh = LearnedOptimizer(params, rule, lr=torch.tensor(1.0))
        fresh.load_state_dict(opt.state_dict())
        backend = CountingBackend("eager")
        step = torch.compile(fresh.step, backend=backend, fullgraph=True)
        for _ in range(3):
            params[0].grad = torch.ones(3, 5)
            params[1].grad = torch.tensor([1.0, bad, -1.0])
            step()
        assert backend.graphs == 1
        assert all(state["step"].item() == 5.0 for state in fresh.state.values())
        results.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*results)


@pytest.mark.skipif(not COMPILED, reason=f"no kernel: {kernels.status()}")
@pytest.mark.parametrize(
    ("lr", "dtype"), [(1.0, torch.bfloat16), (torch.tensor(1.0), torch.float32)]
)
def test_the_graph_calls_the_kernel_and_gives_its_bits(
    lr: float | Tensor, dtype: torch.dtype
) -> None:
    settings: dict[str, Any] = {"steps": 6, "state_dtype": dtype, "weight_decay": 1.0}
    rates = [lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2)]
    backend = CountingBackend("aot_eager")
    compiled, opt = run(HorizonRule(), backend, rates[0], **settings)
    eager, other = run(HorizonRule(), None, rates[1], **settings)
    assert backend.kernels == backend.graphs == (1 if isinstance(lr, Tensor) else 2)
    assert torch.equal(compiled, eager)
    for state, wanted in zip(opt.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(state[key], value) for key, value in wanted.items())


def test_rounded_products_are_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "FEWEST_ROUNDED", 0)
    rule, backend = HorizonRule(HorizonConfig(eigenbasis=True)), CountingBackend("aot_eager")
    compiled, _ = run(rule, backend, torch.tensor(1.0), steps=4)
    assert backend.graphs == 1
    assert torch.equal(compiled, run(rule, None, torch.tensor(1.0), steps=4)[0])


def test_what_the_kernel_does_not_take_is_traced() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(2, 3).t())  # not contiguous
    twin = nn.Parameter(param.detach().clone())
    param.grad = torch.randn(3, 2)
    twin.grad = param.grad.clone()
    opt = LearnedOptimizer([param], HorizonRule())
    torch.compile(opt.step, backend="eager", fullgraph=True)()
    LearnedOptimizer([twin], HorizonRule()).step()
    assert_close(param, twin, rtol=0, atol=1e-6)
