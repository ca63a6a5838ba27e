"""What surrounds a step must not change its bits: every rule, under every mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter

from learned_optim import LearnedOptimizer, list_pretrained, load_rule
from learned_optim.rules import UpdateRule

from .common import small_batch, small_net


@contextmanager
def setting(get: Callable[[], object], put: Callable[[object], None], value: object):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def nested_autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast without cache": lambda: torch.autocast(
        "cpu", dtype=torch.bfloat16, cache_enabled=False
    ),
    "autocast nested": nested_autocast,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "device context meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": deterministic,
    "matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


def run(rule: UpdateRule | str, mode: Callable[[], AbstractContextManager[object]], built_inside):
    """Construction, or every step but the first and the last, inside the mode."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(7, 5)), Parameter(torch.randn(3)), Parameter(torch.tensor(0.5))]
    grads = [[torch.randn(p.shape) for p in params] for _ in range(6)]
    with mode() if built_inside else nullcontext():
        opt = LearnedOptimizer(params, rule, weight_decay=0.1)
    for step, given in enumerate(grads):
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        with mode() if step != (0 if not built_inside else 3) else nullcontext():
            opt.step()
    saved = opt.state_dict()["state"]
    return [p.detach().clone() for p in params], [v for s in saved.values() for v in s.values()]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_does_not_depend_on_what_surrounds_it(rule: UpdateRule, mode: str) -> None:
    plain = run(rule, nullcontext, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for built_inside in (False, True):
            for ours, theirs in zip(run(rule, MODES[mode], built_inside), plain, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert a.dtype is b.dtype
                    assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_load_alike_in_every_mode(mode: str) -> None:
    """From the file, too, whatever the modes do to new tensors."""
    from learned_optim import _frozen

    name = "default-fast"
    expected = load_rule(name).fingerprint()
    _frozen._SHARED.clear()
    with warnings.catch_warnings(), MODES[mode]():
        warnings.simplefilter("ignore", UserWarning)
        opt = LearnedOptimizer([Parameter(torch.zeros(2, device="cpu"))], name)
    assert opt.rule.fingerprint() == expected
    assert all(w.device.type == "cpu" and w.dtype is torch.float32 for w in opt.rule.parameters())
    _frozen._SHARED.clear()


def test_the_modes_are_as_before_after_a_step(rule: UpdateRule) -> None:
    param = Parameter(torch.ones(3))
    opt = LearnedOptimizer([param], rule)
    param.grad = torch.ones(3)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt.step()
            assert torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_closure_keeps_its_autocast() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters(), "default-fast")
    x, y = small_batch()
    dtypes = []

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(x)
        dtypes.append(out.dtype)
        loss = nn.functional.cross_entropy(out, y)
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(closure)
    assert dtypes == [torch.bfloat16]


# ---- parameters without values: memory estimators, deferred initialization


def steps_on_the_meta_device(rule: UpdateRule | str) -> None:
    model = nn.Linear(10, 3, device="meta")
    opt = LearnedOptimizer(model.parameters(), rule)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 10, device="meta")).sum().backward()
        opt.step()
    for param, state in opt.state.items():
        assert all(value.device.type == "meta" for value in state.values())
        assert param.device.type == "meta"
    assert opt.state_dict()["state"][0]["step"].shape == ()


def test_steps_on_the_meta_device(rule: UpdateRule) -> None:
    steps_on_the_meta_device(rule)


@pytest.mark.parametrize("name", list_pretrained())
def test_steps_of_shipped_checkpoints_on_the_meta_device(name: str) -> None:
    steps_on_the_meta_device(name)


def test_fake_tensors_all_through(rule: UpdateRule) -> None:
    """Built and stepped under a fake mode, as estimators do; no real state comes of it."""
    with FakeTensorMode():
        model = nn.Linear(10, 3)
        opt = LearnedOptimizer(model.parameters(), rule)
        for _ in range(2):
            opt.zero_grad()
            model(torch.randn(4, 10)).sum().backward()
            opt.step()
        values = [value for state in opt.state.values() for value in state.values()]
        assert all(isinstance(value, FakeTensor) for value in values)
    run(rule, nullcontext, False)  # nothing fake was remembered


def test_fake_parameters_alone(rule: UpdateRule) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Linear(10, 3)
    opt = LearnedOptimizer(model.parameters(), rule)
    with FakeTensorMode(allow_non_fake_inputs=True) as _:
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        opt.step()


def test_state_sizes_under_fake_tensors_are_the_real_ones(rule: UpdateRule) -> None:
    """What a memory estimator is after."""

    def sizes(make: Callable[[], AbstractContextManager[object]]) -> list[dict[str, int]]:
        with make():
            model = nn.Linear(10, 3)
            opt = LearnedOptimizer(model.parameters(), rule)
            model(torch.ones(4, 10)).sum().backward()
            opt.step()
            return [{k: v.numel() for k, v in state.items()} for state in opt.state.values()]

    assert sizes(FakeTensorMode) == sizes(nullcontext)
