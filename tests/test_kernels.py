"""The compiled step against the pure form, which it must equal up to rounding."""

import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_states, python, random_rule
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, kernels
from learned_optim.kernels import _build, _library
from learned_optim.meta.seeding import torch_threads
from learned_optim.rules import State, StepSettings, UpdateRule
from learned_optim.rules import _history as history
from learned_optim.rules.horizon import HorizonConfig, HorizonRule

ROOT = Path(__file__).parent.parent
COMPILED = kernels.status().startswith("compiled")
needs_kernel = pytest.mark.skipif(not COMPILED, reason=f"no compiled kernel: {kernels.status()}")
needs_compiler = pytest.mark.skipif(not _build.compilers(), reason="no C++ compiler on the path")

#: Deviations allowed after up to three steps, of ten times the parameters and of the statistics,
#: relative where they are above 1: rounding of float32, or of the parameter's or the state's type.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
HALF_STATE_TOLERANCE = 3e-2
MOMENTS = ("fast", "slow", "square")


def horizon_rule(dtype: torch.dtype = torch.float32, config: int = 0) -> HorizonRule:
    return random_rule("horizon", dtype, config).requires_grad_(False)


def kernel_step_(
    rule: HorizonRule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    updates: list[Tensor | None] | None = None,
    kernel: Callable[..., bool] = kernels.step_,
    **numbers: Any,
) -> bool:
    """The kernel alone."""
    return kernel(rule.network(), params, grads, states, StepSettings(**numbers), updates)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def problem(
    shapes: list[tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    return [p.to(dtype) for p in params], [g.to(dtype) for g in grads]


def start(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[HorizonRule, list[Tensor], list[Tensor], list[State]]:
    """A rule, and parameters, gradients and fresh states for :func:`kernel_step_`."""
    rule, (params, grads) = horizon_rule(), problem(shapes, dtype=dtype)
    return rule, params, grads, fresh_states(rule, params)


def grads_of(
    kind: str, scale: float, params: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    found = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator)
        if kind == "drift":
            grad = grad + 2
        elif kind == "sparse":
            grad = grad * (torch.rand(param.shape, generator=generator) < 0.1)
        elif kind == "zero":
            grad = grad * (torch.rand((), generator=generator) < 0.3)
        elif kind == "broken":
            bad = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
            where = torch.rand(param.shape, generator=generator) < 0.2
            grad = torch.where(where, bad[torch.randint(4, param.shape, generator=generator)], grad)
        found.append((grad * scale).to(param.dtype))
    return found


SHAPES = [
    (), (0,), (0, 3), (1,), (7, 1), (1, 1), (17,), (33, 64), (5, 3, 3), (1025,), (2999,), (70, 70),
]  # fmt: skip


def draw_case(
    seed: int, shapes: list[tuple[int, ...]] = SHAPES, tensors: int = 4
) -> dict[str, Any]:
    """Some tensors of a call, their past, gradients and settings."""
    rng = random.Random(seed)

    def each(*values: Any) -> list[Any]:
        return rng.choices(values, k=tensors)

    return {
        "seed": seed,
        "shapes": rng.choices(shapes, k=rng.randint(1, tensors)),
        "dtypes": each(torch.float32, *TOLERANCE),
        "half_state": rng.random() < 0.3,
        "config": rng.randrange(len(HorizonRule.test_configs)),
        "steps": rng.randint(1, 3),
        "ages": each(0, 1, 7, 300),
        "apart": each(False, True),
        # In three steps none of them leaves 0 after reaching it by a sum of gains of 1.5, where
        # rounding decides.
        "confidence": each(-2.9, -1.0, 0.0),
        "scale": rng.choice([1e-12, 1e-4, 1.0, 1e6]),
        "param_scale": rng.choice([0.0, 1e-6, 0.01, 1.0, 1.0, 100.0]),
        "momenta_scale": rng.choice([1.0, 1.0, 1e-5]),
        "kind": rng.choice(["noise", "noise", "drift", "sparse", "zero", "broken"]),
        "numbers": {
            "total_steps": rng.choice([None, None, 3, 20, 1000, 10**5]),
            "lr": rng.choice([1.0, 0.1, 2.0]),
            "weight_decay": rng.choice([0.0, 1.0, 300.0]),
            "maximize": rng.random() < 0.5,
            "warmup": rng.choice([0, 0, 3, 100]),
        },
    }


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def compare_with_the_pure_form(case: dict[str, Any], step_: Callable[..., bool]) -> None:
    """Steps of float32 by a kernel, as ``kernel_step_``, and of float64 by the pure form.

    The pure form recovers the momenta before a gradient by subtraction. Where they were zero or
    small it correlates rounding errors in float32; the kernel and float64 do not.
    """
    generator = torch.Generator().manual_seed(case["seed"])
    rule, exact = horizon_rule(config=case["config"]), horizon_rule(torch.float64, case["config"])
    exact.load_state_dict(rule.state_dict())
    drawn, _ = problem(case["shapes"], case["seed"])
    params = [case["param_scale"] * p.to(d) for p, d in zip(drawn, case["dtypes"], strict=False)]
    states = fresh_states(rule, params)
    if case["half_state"]:
        for state in states:
            state.update({key: state[key].bfloat16() for key in MOMENTS})
    for param, state, age, log in zip(
        params, states, case["ages"], case["confidence"], strict=False
    ):
        for _ in range(min(age, 2)):  # so that tensors of different ages meet in one call
            past = grads_of("noise", case["scale"], [param], generator)
            UpdateRule.step_(rule, [param], past, [state])
        state["step"].fill_(age)
        state["stats"][history.CONFIDENCE] = log
        for key in ("fast", "slow"):
            state[key].mul_(case["momenta_scale"])
    wanted = [param.to(torch.float64, copy=True) for param in params]
    wanted_states = [
        {k: v.to(v.dtype if k == "step" else torch.float64, copy=True) for k, v in state.items()}
        for state in states
    ]
    places: list[list[Tensor | None]] = [
        [torch.full_like(p, math.nan, dtype=kind) if own else None
         for p, own in zip(params, case["apart"], strict=False)]
        for kind in (torch.float32, torch.float64)
    ]  # fmt: skip
    numbers = StepSettings(**case["numbers"])
    for _ in range(case["steps"]):
        grads = grads_of(case["kind"], case["scale"], params, generator)
        assert step_(rule, params, grads, states, places[0], **case["numbers"])
        cast = [grad.double() for grad in grads]
        UpdateRule.step_(exact, wanted, cast, wanted_states, numbers, updates=places[1])
    for param, state, want, expected, *update in zip(
        params, states, wanted, wanted_states, *places, strict=True
    ):
        tolerance = max(TOLERANCE[param.dtype], HALF_STATE_TOLERANCE * case["half_state"])
        assert state["step"] == expected["step"]
        for key in MOMENTS:
            # In units of the largest; momenta may nearly have cancelled each other out.
            unit = max([1e-37, *expected[key].abs().flatten().tolist()])
            assert_near(state[key] / unit, expected[key] / unit, 5 * tolerance)
        assert_near(state["stats"], expected["stats"], tolerance)
        assert_near(10 * param.double(), 10 * want, tolerance)
        if update[0] is not None and update[1] is not None:
            assert_near(10 * update[0], 10 * update[1], tolerance)


@needs_kernel
def test_equals_the_pure_form() -> None:
    for seed in range(100):
        compare_with_the_pure_form(draw_case(seed), kernel_step_)


@needs_kernel
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    results, library = [], _library.library()
    try:
        for threads in (1, 2, 7, -2):
            if threads < 0:
                library.lo_use_openmp(None)  # threads of its own
            rule, params, grads, states = start([(600, 500), (5,), (3, 90_001)], dtype)
            update = torch.zeros(600, 500)
            for _ in range(2):
                numbers = {"total_steps": 30, "weight_decay": 100.0}
                updates = [update, None, None]
                with torch_threads(abs(threads)):
                    assert kernel_step_(rule, params, grads, states, updates, **numbers)
            results.append([*params, update, *(v for state in states for v in state.values())])
    finally:
        _library.share_threads(library)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


FORKED = """
import os, signal, torch
from test_kernels import kernel_step_, start
torch.set_num_threads(2)
ours, childs = (start([(600_000,)]) for _ in range(2))
childs[1][0].share_memory_()
for _ in range(2):
    assert kernel_step_(*ours)
assert kernel_step_(*childs)
child = os.fork()
if not child:
    signal.alarm(20)  # instead of waiting for threads that the fork has left behind
    os._exit(not kernel_step_(*childs))
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ours[1][0], childs[1][0])
"""


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_child_steps_on_threads_of_its_own() -> None:
    python("-c", FORKED, PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), *sys.path]))


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
def test_each_tensor_may_have_a_network_of_its_own() -> None:
    rules = [horizon_rule(), HorizonRule().requires_grad_(False), horizon_rule()]
    for weight in rules[2].parameters():
        weight.mul_(-0.5)
    shapes: list[tuple[int, ...]] = [(30, 20), (7,), (7,)]
    params, _ = problem(shapes)
    alone, numbers = copies(params), StepSettings(lr=2.0, weight_decay=10.0)
    states, states_alone = fresh_states(rules[0], params), fresh_states(rules[0], params)
    stacked = [torch.stack(weights) for weights in zip(*(r.network() for r in rules), strict=True)]
    for seed in range(3):
        _, grads = problem(shapes, seed)
        assert kernels.step_(stacked, params, grads, states, numbers)
        for rule, *own in zip(rules, alone, grads, states_alone, strict=True):
            assert kernels.step_(rule.network(), *([each] for each in own), numbers)
    assert all(map(torch.equal, params, alone))
    assert not torch.equal(states[1]["fast"], states[2]["fast"])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All numbers whose squares fit into float32, denormal ones included, bit by bit."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.abs().float() < 1e18]
    assert len(every) > 40_000
    rule, apart = horizon_rule(), [torch.zeros(len(every))]
    for decay in (0.0, 370.0, 750.0):
        param, states = every.clone(), fresh_states(rule, [every])
        states[0]["stats"][history.CONFIDENCE] = 0.0
        states[0]["step"].fill_(49)  # the schedule is 1
        numbers = {"weight_decay": decay}
        assert kernel_step_(rule, [param], [torch.ones_like(param)], states, apart, **numbers)
        expected = every * (1 - 1e-3 * decay)
        assert torch.equal(param.view(torch.int16), expected.view(torch.int16))


# ---- what the kernel leaves to the pure form


class Subclass(Tensor):
    pass


def from_inference(size: int) -> Tensor:
    with torch.inference_mode():
        return torch.ones(size)


def one_byte_off(size: int) -> Tensor:
    return torch.frombuffer(bytearray(4 * size + 4), dtype=torch.float32, offset=1, count=size)


#: Of the same shape, and of no kernel.
UNSUITABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "misaligned": lambda t: one_byte_off(t.numel()).view_as(t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "meta": lambda t: t.to("meta"),
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape),
    "negative view": lambda t: torch.view_as_complex(torch.ones(*t.shape, 2)).conj().imag,
    "functional": torch._to_functional_tensor,
}
OF_PARAMETERS: dict[str, Callable[[Tensor], Tensor]] = {
    **UNSUITABLE,
    "strides": lambda t: torch.ones(12)[::2],
    "size": lambda t: torch.ones(5),
}
OF_MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda t: t.double(),
    "bfloat16 alone": lambda t: t.bfloat16(),
    "size": lambda t: t[:5].clone(),
    "strides": lambda t: torch.ones(6, 2)[:, :1],
}
OTHERS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "params": [lambda t: from_inference(6)],
    "grads": [lambda t: t.to_sparse()],
    "updates": [lambda t: t.double(), lambda t: t[:5].clone(), lambda t: torch.ones(12)[::2]],
    "stats": [lambda t: t.double(), lambda t: t[:13].clone()],
    "step": [lambda t: t.long(), lambda t: torch.zeros(2)],
}
#: Tensors of a call that are one: which, and in whose place.
SHARED = {
    "param and grad": ("params", "grads"),
    "param and moment": ("params", "slow"),
    "moments": ("fast", "slow"),
    "param and update": ("params", "updates"),
    "update and moment": ("fast", "updates"),
}

Call = dict[str, list[Tensor]]


def call_of() -> Call:
    """Columns of a call of two tensors."""
    _, params, grads, states = start([(6,), (6,)])
    columns = {key: [state[key] for state in states] for key in states[0]}
    updates = [torch.zeros(6), torch.zeros(6)]
    return {"params": params, "grads": grads, "updates": updates, **columns}


def takes(rule: HorizonRule, call: Call) -> bool:
    states = [{key: call[key][i] for key in (*MOMENTS, "stats", "step")} for i in range(2)]
    return kernel_step_(rule, call["params"], call["grads"], states, list(call["updates"]))


def refuses(rule: HorizonRule, call: Call) -> bool:
    """Whether nothing is done."""
    tensors = [tensor for column in call.values() for tensor in column if is_readable(tensor)]
    before = copies(tensors)
    return not takes(rule, call) and all(map(torch.equal, tensors, before))


def is_readable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return plain and not (torch._is_functional_tensor(tensor) or tensor.is_sparse)


@needs_kernel
@pytest.mark.filterwarnings("ignore:The given buffer")
def test_refuses_tensors_of_other_kinds() -> None:
    rule = horizon_rule()
    assert takes(rule, call_of())
    changes = [(key, what) for key in ("params", "grads") for what in OF_PARAMETERS.values()]
    changes += [(key, what) for key in MOMENTS for what in OF_MOMENTS.values()]
    changes += [(key, what) for key, each in OTHERS.items() for what in each]
    for place, (key, change) in enumerate(changes):
        call = call_of()
        call[key][0] = change(call[key][0])
        assert refuses(rule, call), (place, key)


@needs_kernel
def test_refuses_memory_that_is_written_and_used_elsewhere() -> None:
    rule = horizon_rule()
    for what, (one, other) in SHARED.items():
        call = call_of()
        call[other][0] = call[one][0].detach().view(call[other][0].shape)
        assert refuses(rule, call), what
    for key in ("params", "step"):
        twice = call_of()
        twice[key][1] = twice[key][0]
        assert refuses(rule, twice), key
    memory, overlapping = torch.zeros(10), call_of()
    overlapping["params"][0], overlapping["grads"][0] = memory[:6], memory[4:]
    assert refuses(rule, overlapping)


@needs_kernel
def test_refuses_networks_and_lengths_of_runs() -> None:
    _, params, grads, states = start([(6,)])
    for rule in (horizon_rule(torch.float64), HorizonRule(HorizonConfig(hidden_size=1025))):
        assert not kernel_step_(rule, params, grads, states)
    rule = HorizonRule(HorizonConfig(hidden_size=1024))
    for total in (0, -1.0, math.nan, math.inf, torch.tensor(5.0)):
        assert not kernel_step_(rule, params, grads, states, total_steps=total)
    with pytest.raises(ValueError, match="1 parameters, 2 gradients and 1 states"):
        kernel_step_(rule, params, grads * 2, states)
    assert kernel_step_(rule, params, grads, states)


@needs_kernel
def test_refuses_under_modes_and_transforms() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    rule, params, grads, states = start([(6,)])
    for mode in (FakeTensorMode(), TorchFunctionMode()):
        with mode:
            assert not kernel_step_(rule, params, grads, states)

    def inside(x: Tensor) -> Tensor:
        assert not kernel_step_(rule, params, grads, states)
        return x

    torch.func.vmap(inside)(torch.ones(2))
    assert not states[0]["step"]


# ---- inside the rule and the optimizer


def train() -> Tensor:
    params = [nn.Parameter(p) for p in problem([(20, 30), (20,)])[0]]
    optimizer = LearnedOptimizer(params, horizon_rule(), weight_decay=1.0, warmup=3, total_steps=9)
    for seed in range(4):
        for param, grad in zip(params, problem([(20, 30), (20,)], seed)[1], strict=True):
            param.grad = grad
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


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
    assert kernel_step_(*start([(600, 1000)]))
    tiny = torch.full((64,), 1e-40)
    assert (tiny * 0.5 > 0).all()
    assert sys.float_info.min / 2 > 0
    assert 1.0 + sys.float_info.epsilon / 2 == 1.0 < 1.0 + 0.51 * sys.float_info.epsilon


# ---- the library: built, missing, stale, switched off


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, now and after the test."""
    monkeypatch.delenv(_build.SWITCH, raising=False)
    _library.loaded.cache_clear()
    monkeypatch.setattr(_library, "_warned", False)
    yield monkeypatch
    _library.loaded.cache_clear()


def other_library(text: bytes | None) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Put ``text`` in the place of the library, or nothing."""

    def change(patch: pytest.MonkeyPatch, folder: Path) -> None:
        patch.setattr(_build, "LIBRARY", folder / "libstep.so")
        if text is not None:
            (folder / "libstep.so").write_bytes(text)

    return change


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (other_library(None), "missing"),
        (other_library(b"not a library"), "unusable"),
        pytest.param(
            lambda patch, _: patch.setattr(_build, "source_hash", lambda: "another source"),
            "stale",
            marks=needs_kernel,
        ),
    ],
)
def test_without_a_library_one_warning_and_the_pure_form(
    change: Callable[..., None], status: str, reloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_kernel = train() if COMPILED else None
    _library.loaded.cache_clear()
    change(reloaded, tmp_path)
    rule, meta = horizon_rule(), [torch.zeros(3, device="meta")]
    assert not kernel_step_(rule, meta, meta, fresh_states(rule, meta))  # needs none: no warning
    with pytest.warns(RuntimeWarning, match=rf"{status}.*python -m learned_optim\.kernels") as said:
        by_pure_form = train()
    if by_kernel is not None:
        torch.testing.assert_close(by_pure_form, by_kernel, rtol=0, atol=1e-6)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert kernels.status().startswith(status)


def test_switched_off_is_silent(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setenv(_build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()
    assert kernels.status() == f"off: {_build.SWITCH}=0"


@needs_compiler
def test_builds_without_vectors_pragma_and_clones(tmp_path: Path) -> None:
    library = tmp_path / _build.LIBRARY.name
    command = _build.command(_build.compilers()[0], _build._CHOICES[-1], library)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, why = _library.load(library)
    assert why == f"compiled: {library}"
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
    flags = ["-std=c++17", "-O0", "-g", "-pthread", "-DLO_NO_CLONES", "-fno-sanitize-recover=all"]
    build = [*_build.compilers()[0], *flags, *_build.macros(), "-fsanitize=address,undefined"]
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
