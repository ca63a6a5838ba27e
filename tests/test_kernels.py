"""The compiled step against the pure form, which it must equal up to rounding."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_states, random_rule
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, kernels
from learned_optim.kernels import _build, _library
from learned_optim.rules import UpdateRule
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

ROOT = Path(__file__).parent.parent
COMPILED = kernels.status().startswith("compiled")
needs_kernel = pytest.mark.skipif(not COMPILED, reason=f"no compiled kernel: {kernels.status()}")
needs_compiler = pytest.mark.skipif(not _build.compilers(), reason="no C++ compiler on the path")

#: Deviations allowed after up to five steps, of ten times the parameters and of the statistics,
#: relative where they are above 1: rounding of float32, or of the parameter's or the state's type.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
HALF_STATE_TOLERANCE = 3e-2


def horizon_rule(dtype: torch.dtype = torch.float32, config: int = 0) -> HorizonRule:
    rule = random_rule("horizon", dtype, config)
    assert isinstance(rule, HorizonRule)
    return rule.requires_grad_(False)


def pure_step_(rule: HorizonRule, *arguments: Any, **keywords: Any) -> None:
    """The step that the rule inherits."""
    UpdateRule.step_(rule, *arguments, **keywords)


def kernel_step_(
    rule: HorizonRule, params: list[Tensor], grads: list[Tensor], states: Any, **keywords: Any
) -> bool:
    """The kernel alone."""
    return kernels.step_(
        rule._network(), params, grads, states, config=rule.kernel_config(), **keywords
    )


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def state_copies(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in state.items()} for state in states]


def problem(
    shapes: list[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    params = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    return [p.to(dtype) for p in params], [g.to(dtype) for g in grads]


SHAPES = st.one_of(
    st.sampled_from([(), (0,), (0, 3), (1,), (7, 1), (1, 1), (17,), (5, 3, 3), (1025,), (70, 70)]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 3000)),
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "shapes": draw(st.lists(SHAPES, min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 10**6)),
        "dtype": draw(st.sampled_from([torch.float32, *TOLERANCE])),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "config": draw(st.integers(0, len(HorizonRule.test_configs) - 1)),
        "steps": draw(st.integers(1, 5)),
        "ages": draw(st.lists(st.sampled_from([0, 1, 7, 300]), min_size=4, max_size=4)),
        "scale": draw(st.sampled_from([1e-12, 1e-4, 1.0, 1e6])),
        "param_scale": draw(st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1.0, 100.0])),
        "momenta_scale": draw(st.sampled_from([1.0, 1.0, 1e-5])),
        "kind": draw(st.sampled_from(["noise", "noise", "drift", "sparse", "zero", "broken"])),
        "keywords": {
            "total_steps": draw(st.sampled_from([None, None, 3, 20, 1000, 10**5])),
            "lr": draw(st.sampled_from([1.0, 0.1, 2.0])),
            "maximize": draw(st.booleans()),
            "warmup": draw(st.sampled_from([0, 0, 3, 100])),
        },
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 30.0])),
    }


def grads_of(
    case: dict[str, Any], params: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    found = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        if case["kind"] == "drift":
            grad = grad + 2
        elif case["kind"] == "sparse":
            grad = grad * (torch.rand(param.shape, generator=generator) < 0.1)
        elif case["kind"] == "zero":
            grad = grad * (torch.rand((), generator=generator) < 0.3)
        elif case["kind"] == "broken":
            bad = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
            where = torch.rand(param.shape, generator=generator) < 0.2
            pick = torch.randint(4, param.shape, generator=generator)
            grad = torch.where(where, bad[pick], grad)
        found.append((grad * case["scale"]).to(param.dtype))
    return found


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    got, want = got.double(), want.double()
    unit = want.abs().clamp(min=1)
    worst = ((got - want).abs() / unit).max() if got.numel() else torch.zeros(())
    assert worst <= tolerance, f"{what}: {worst}"


@needs_kernel
@settings(max_examples=250, deadline=None, derandomize=True)
@given(case=cases(), oracle=st.sampled_from([torch.float32, torch.float64]))
def test_equals_the_pure_form(case: dict[str, Any], oracle: torch.dtype) -> None:
    # The gradient of a single coordinate agrees wholly or not at all, so that its trust stops at 1,
    # where it stays, or a rounding error below, where it goes on.
    assume(case["config"] == 0 or all(math.prod(shape) != 1 for shape in case["shapes"]))
    if case["kind"] not in ("noise", "drift") or case["momenta_scale"] < 1:
        # The float32 form recovers the momenta before a gradient by subtraction. Where they were
        # zero or small it correlates rounding errors; the kernel and float64 do not.
        oracle = torch.float64
    generator = torch.Generator().manual_seed(case["seed"])
    rule, exact = horizon_rule(config=case["config"]), horizon_rule(torch.float64, case["config"])
    exact.load_state_dict(rule.state_dict())
    reference = exact if oracle is torch.float64 else rule
    params, _ = problem(case["shapes"], case["seed"], case["dtype"])
    for param in params:
        param.mul_(case["param_scale"])
    state_dtype = case["state_dtype"]
    states = fresh_states(rule, params)
    for state, age in zip(states, case["ages"], strict=False):
        for key in ("fast", "slow", "square"):
            state[key] = state[key].to(state_dtype)
        # A past, so that tensors of different ages meet in one call.
        for _ in range(min(age, 2)):
            index = next(i for i, s in enumerate(states) if s is state)
            past = grads_of({**case, "kind": "noise"}, params[index : index + 1], generator)
            pure_step_(rule, params[index : index + 1], past, [state])
        state["step"].fill_(age)
        for key in ("fast", "slow"):
            state[key].mul_(case["momenta_scale"])
    if oracle is torch.float64:
        expected_params = [param.to(oracle, copy=True) for param in params]
        expected = [
            {k: v.to(v.dtype if k == "step" else oracle, copy=True) for k, v in state.items()}
            for state in states
        ]
    else:
        expected_params, expected = copies(params), state_copies(states)
    keywords = case["keywords"]
    for _ in range(case["steps"]):
        grads = grads_of(case, params, generator)
        assert kernel_step_(
            rule, params, grads, states, decay=1e-3 * case["weight_decay"], **keywords
        )
        cast = [grad.to(param.dtype) for grad, param in zip(grads, expected_params, strict=True)]
        pure_step_(
            reference, expected_params, cast, expected,
            weight_decay=case["weight_decay"], **keywords,
        )  # fmt: skip
    tolerance = TOLERANCE[case["dtype"]]
    if state_dtype is torch.bfloat16:
        tolerance = max(tolerance, HALF_STATE_TOLERANCE)
    for index, (state, wanted) in enumerate(zip(states, expected, strict=True)):
        assert state["step"] == wanted["step"]
        for key in ("fast", "slow", "square"):
            # In units of the largest; momenta may nearly have cancelled each other out.
            unit = max([1e-37, *wanted[key].abs().flatten().tolist()])
            assert_near(state[key] / unit, wanted[key] / unit, 5 * tolerance, f"{key} of {index}")
        assert_near(state["stats"], wanted["stats"], tolerance, f"stats of {index}")
        assert_near(
            10 * params[index].double(),
            10 * expected_params[index].double(),
            tolerance,
            f"parameter {index}",
        )


@needs_kernel
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    rule, results = horizon_rule(), []
    before, library = torch.get_num_threads(), _library.library()
    assert library is not None
    try:
        for threads in (1, 2, 7, -2):
            torch.set_num_threads(abs(threads))
            if threads < 0:
                library.lo_use_openmp(None)  # threads of its own
            params, grads = problem([(1100, 700), (5,), (3, 90_001)], dtype=dtype)
            states = fresh_states(rule, params)
            for _ in range(2):
                assert kernel_step_(rule, params, grads, states, total_steps=30, decay=0.1)
            results.append([*params, *(value for state in states for value in state.values())])
    finally:
        torch.set_num_threads(before)
        _library.share_threads(library)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


FORKED = """
import os, signal, torch
from test_kernels import fresh_states, horizon_rule, kernel_step_, problem
torch.set_num_threads(2)
rule = horizon_rule()

def stepped():
    params, grads = problem([(600_000,)])
    params[0].share_memory_()
    return params, grads, fresh_states(rule, params)

ours, childs = stepped(), stepped()
for _ in range(2):
    assert kernel_step_(rule, *ours)
assert kernel_step_(rule, *childs)
child = os.fork()
if not child:
    signal.alarm(20)  # instead of waiting for threads that the fork has left behind
    os._exit(not kernel_step_(rule, *childs))
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ours[0][0], childs[0][0])
"""


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_child_steps_on_threads_of_its_own() -> None:
    folders = [str(ROOT / "tests"), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", FORKED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_kernel
def test_averages_over_large_tensors_are_exact() -> None:
    rule, size = horizon_rule(), 5_000_000
    param, grad = torch.rand(size).add_(1), torch.rand(size).add_(1)
    states = fresh_states(rule, [param])
    rms, level = param.double().square().mean().sqrt(), grad.double().square().mean().log()
    assert kernel_step_(rule, [param], [grad], states)
    stats = states[0]["stats"].double()
    torch.testing.assert_close(stats[:4], torch.stack((rms, rms, level, level)), rtol=1e-6, atol=0)


@needs_kernel
def test_each_tensor_may_have_a_network_and_a_rate_of_its_own() -> None:
    rules = [horizon_rule(), HorizonRule().requires_grad_(False), horizon_rule()]
    for weight in rules[2].parameters():
        weight.mul_(-0.5)
    params, _ = problem([(30, 20), (7,), (7,)])
    alone, scales = copies(params), [1.0, 0.5, 3.0]
    states, states_alone = fresh_states(rules[0], params), fresh_states(rules[0], params)
    stacked = [torch.stack(weights) for weights in zip(*(r._network() for r in rules), strict=True)]
    for seed in range(3):
        _, grads = problem([(30, 20), (7,), (7,)], seed)
        config = rules[0].kernel_config()
        assert kernels.step_(
            stacked, params, grads, states, config=config, lr=2.0, lr_scales=scales, decay=1e-2
        )
        for i, rule in enumerate(rules):
            own = ([alone[i]], [grads[i]], [states_alone[i]])
            assert kernel_step_(rule, *own, lr=2 * scales[i], decay=1e-2)
    assert all(map(torch.equal, params, alone))
    assert not torch.equal(states[1]["fast"], states[2]["fast"])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All numbers whose squares fit into float32, denormal ones included, bit by bit."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.abs().float() < 1e18]
    assert len(every) > 40_000
    rule = HorizonRule(HorizonConfig(warmup_steps=1)).requires_grad_(False)  # of whole decay
    for decay in (0.0, 0.37, 0.75):  # by zero gradients, parameters only decay
        param, states = every.clone(), fresh_states(rule, [every])
        assert kernel_step_(rule, [param], [torch.zeros_like(param)], states, decay=decay)
        assert torch.equal(param.view(torch.int16), (every * (1 - decay)).view(torch.int16))


# ---- what the kernel leaves to the pure form


class Subclass(Tensor):
    pass


def unsuitable() -> dict[str, Any]:
    """Changes to a call, by what is wrong afterwards."""
    inference = torch.inference_mode()

    def from_inference(size: int) -> Tensor:
        with inference:
            return torch.ones(size)

    def one_byte_off(size: int) -> Tensor:
        return torch.frombuffer(bytearray(4 * size + 4), dtype=torch.float32, offset=1, count=size)

    def put(column: str, value: Any) -> Any:
        def change(call: dict[str, Any]) -> None:
            if column in call:
                call[column][0] = value(call[column][0])
            else:
                call["states"][0][column] = value(call["states"][0][column])

        return change

    def same(column: str, other: str) -> Any:
        return lambda call: put(column, lambda _: call[other][0])(call)

    def second_is_first(call: dict[str, Any]) -> None:
        call["params"][1] = call["params"][0]
        call["grads"][1] = call["grads"][0].clone()
        call["states"][1] = state_copies(call["states"])[0]

    def parts_overlap(call: dict[str, Any]) -> None:
        memory = torch.zeros(10)
        call["params"][0], call["grads"][0] = memory[:6], memory[4:]

    every: dict[str, Any] = {
        "param twice": second_is_first,
        "grad is param": same("grads", "params"),
        "param and grad overlap": parts_overlap,
        "state is param": lambda call: put("slow", lambda _: call["params"][0].detach().view(6, 1))(
            call
        ),
        "moments are one tensor": lambda call: put("slow", lambda _: call["states"][0]["fast"])(
            call
        ),
        "steps are one tensor": lambda call: put("step", lambda _: call["states"][1]["step"])(call),
    }
    for column in ("params", "grads"):
        every |= {
            f"{column}: strides": put(column, lambda t: torch.ones(12)[::2]),
            f"{column}: dtype": put(column, lambda t: t.double()),
            f"{column}: integers": put(column, lambda t: t.int()),
            f"{column}: misaligned": put(column, lambda t: one_byte_off(6)),
            f"{column}: subclass": put(column, lambda t: t.as_subclass(Subclass)),
            f"{column}: meta": put(column, lambda t: t.to("meta")),
            f"{column}: zero tensor": put(column, lambda t: torch._efficientzerotensor(6)),
            f"{column}: negative view": put(
                column, lambda t: torch.view_as_complex(torch.ones(6, 2)).conj().imag
            ),
            f"{column}: functional": put(column, torch._to_functional_tensor),
            f"{column}: size": put(column, lambda t: torch.ones(5)),
        }
    every["params: inference"] = put("params", lambda t: from_inference(6))
    every["grads: sparse"] = put("grads", lambda t: t.to_sparse())
    for column in ("fast", "slow", "square"):
        every |= {
            f"{column}: float64": put(column, lambda t: t.double()),
            f"{column}: bfloat16 alone": put(column, lambda t: t.bfloat16()),
            f"{column}: size": put(column, lambda t: t[:5].clone()),
            f"{column}: strides": put(column, lambda t: torch.ones(6, 2)[:, :1]),
        }
    every |= {
        "stats: float64": put("stats", lambda t: t.double()),
        "stats: size": put("stats", lambda t: t[:13].clone()),
        "step: integer": put("step", lambda t: t.long()),
        "step: size": put("step", lambda t: torch.zeros(2)),
    }
    return every


def snapshot(call: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    tensors = [*call["params"], *call["grads"], *(v for s in call["states"] for v in s.values())]
    kinds = (Tensor, nn.Parameter)
    return [
        (t, t.clone())
        for t in tensors
        if type(t) in kinds and t.device.type == "cpu" and not torch._is_functional_tensor(t)
    ]


@needs_kernel
@pytest.mark.parametrize("what", list(unsuitable()))
@pytest.mark.filterwarnings("ignore:The given buffer")
def test_refuses(what: str) -> None:
    rule = horizon_rule()
    params, grads = problem([(6,), (6,)])
    call = {"params": params, "grads": grads, "states": fresh_states(rule, params)}
    assert kernel_step_(rule, copies(params), grads, state_copies(call["states"]))
    unsuitable()[what](call)
    before = snapshot(call)
    assert not kernel_step_(rule, call["params"], call["grads"], call["states"])
    for now, then in before:
        assert torch.equal(now, then) if not now.is_sparse else True


@needs_kernel
@pytest.mark.parametrize("total", [0, -1.0, math.nan, math.inf, torch.tensor(5.0)])
def test_refuses_lengths_of_runs(total: Any) -> None:
    rule = horizon_rule()
    params, grads = problem([(6,)])
    assert not kernel_step_(rule, params, grads, fresh_states(rule, params), total_steps=total)


@needs_kernel
def test_refuses_networks() -> None:
    params, grads = problem([(6,)])
    for rule in (horizon_rule(torch.float64), HorizonRule(HorizonConfig(hidden_size=1025))):
        states = fresh_states(horizon_rule(), params)
        assert not kernel_step_(rule, params, grads, states)
    wide = HorizonRule(HorizonConfig(hidden_size=1024))
    assert kernel_step_(wide, params, grads, states)


@needs_kernel
def test_refuses_under_modes_and_transforms() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    rule = horizon_rule()
    params, grads = problem([(6,)])
    states = fresh_states(rule, params)
    for mode in (FakeTensorMode(), TorchFunctionMode()):
        with mode:
            assert not kernel_step_(rule, params, grads, states)

    def inside(x: Tensor) -> Tensor:
        assert not kernel_step_(rule, params, grads, states)
        return x

    torch.func.vmap(inside)(torch.ones(2))
    assert not states[0]["step"]


# ---- inside the rule and the optimizer


def train(dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    params = [nn.Parameter(p) for p in problem([(20, 30), (20,)], dtype=dtype)[0]]
    optimizer = LearnedOptimizer(params, horizon_rule(), **options)
    for seed in range(4):
        for param, grad in zip(params, problem([(20, 30), (20,)], seed, dtype)[1], strict=True):
            param.grad = grad
        optimizer.step()
    return torch.cat([param.detach().double().flatten() for param in params])


@needs_kernel
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_the_optimizer_uses_it(
    state_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def recorded(name: str, step: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> bool:
            calls.append((name, step(*arguments, **keywords)))
            return calls[-1][1]

        return run

    step_, bind = kernels.step_, kernels.bind
    monkeypatch.setattr(kernels, "step_", recorded("first", step_))
    monkeypatch.setattr(kernels, "bind", lambda *a, **k: recorded("bound", bind(*a, **k)))
    options: dict[str, Any] = {"weight_decay": 1.0, "warmup": 3, "total_steps": 9}
    options["state_dtype"] = state_dtype
    ours = train(**options)
    assert calls == [("first", True), *[("bound", True)] * 3]
    monkeypatch.setattr(kernels, "step_", lambda *a, **k: False)
    monkeypatch.setattr(kernels, "bind", lambda *a, **k: None)
    tolerance = 1e-6 if state_dtype is None else 1e-3
    torch.testing.assert_close(ours, train(**options), rtol=0, atol=tolerance)


@needs_kernel
def test_parameters_count_the_change() -> None:
    rule, weight = horizon_rule(), nn.Parameter(torch.ones(3))
    other = torch.ones(3, requires_grad=True)
    loss = (weight * other).sum()
    assert kernel_step_(rule, [weight], [torch.ones(3)], fresh_states(rule, [weight]))
    assert weight._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_denormals_and_rounding_stay_as_they_are() -> None:
    rule = horizon_rule()
    params, grads = problem([(600, 1000)])
    assert kernel_step_(rule, params, grads, fresh_states(rule, params))
    tiny = torch.full((64,), 1e-40)
    assert (tiny * 0.5 > 0).all()
    assert sys.float_info.min / 2 > 0
    assert 1.0 + sys.float_info.epsilon / 2 == 1.0 < 1.0 + 0.51 * sys.float_info.epsilon


# ---- the library: built, missing, stale, switched off


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, now and after the test."""
    monkeypatch.delenv(_build.SWITCH, raising=False)
    monkeypatch.setattr(_library, "_warned", False)
    _library.loaded.cache_clear()
    yield monkeypatch
    _library.loaded.cache_clear()


def test_a_missing_library_warns_once_and_falls_back(
    reloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reloaded.setattr(_build, "LIBRARY", tmp_path / "libstep.so")
    with pytest.warns(RuntimeWarning, match=r"missing.*python -m learned_optim\.kernels") as caught:
        by_pure_form = train()
    assert len(caught) == 1
    assert kernels.status().startswith("missing")
    assert by_pure_form.isfinite().all()


def test_other_devices_do_not_miss_the_library(
    reloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reloaded.setattr(_build, "LIBRARY", tmp_path / "libstep.so")
    rule = horizon_rule()
    params = [torch.zeros(3, device="meta")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernel_step_(rule, params, params, fresh_states(rule, params))


def test_switched_off_is_silent(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setenv(_build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()
    assert kernels.status() == f"off: {_build.SWITCH}=0"


def test_what_is_no_library_is_not_used(reloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libstep.so"
    path.write_bytes(b"not a library")
    assert _library.load(path)[0] is None
    assert _library.load(path)[1].startswith("unusable")


@needs_kernel
def test_a_stale_library_is_not_used(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setattr(_build, "source_hash", lambda: "another source")
    with pytest.warns(RuntimeWarning, match="stale"):
        train()
    assert kernels.status().startswith("stale")


@needs_compiler
@pytest.mark.parametrize("choice", _build._CHOICES[1:])
def test_builds_without_vectors_pragma_and_clones(choice: list[str], tmp_path: Path) -> None:
    library = tmp_path / _build.LIBRARY.name
    command = _build.command(_build.compilers()[0], choice, library)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, why = _library.load(library)
    assert why == f"compiled: {library}"
    assert found is not None
    assert found.lo_lstm_step(0, None, None, None, 1) != 0  # refused: the pure form steps


def test_without_a_compiler_the_build_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler"):
        _build.build(library=tmp_path / "libstep.so")
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"cannot\")'")
    with pytest.raises(_build.BuildError, match="cannot"):
        _build.build(library=tmp_path / "libstep.so")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' flags are those of Linux")
def test_memory_and_undefined_behaviour(tmp_path: Path) -> None:
    """All types, sizes around the blocks' borders, wrong pointers, under the sanitizers."""
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-DLO_NO_CLONES", "-fno-sanitize-recover=all"]
    build = [*_build.compilers()[0], *flags, "-fsanitize=address,undefined"]
    source = ROOT / "tests" / "kernels_fuzz.cpp"
    done = subprocess.run(
        [*build, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr[-300:]}")
    environment = {**os.environ, "LD_PRELOAD": ""}
    ran = subprocess.run([program], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("passed")
