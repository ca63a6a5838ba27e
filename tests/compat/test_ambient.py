"""What surrounds a step must not change its bits: every rule, under every mode."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter

from learned_optim import LearnedOptimizer, load_rule, save_rule
from learned_optim.rules import UpdateRule

from .common import small_batch, small_net, step_with

Mode = Callable[[], AbstractContextManager[object]]


def setting(put: Callable[[object], None], value: object, usual: object) -> Mode:
    """A mode that sets a global value."""

    @contextmanager
    def mode():
        put(value)
        try:
            yield
        finally:
            put(usual)

    return mode


MODES: dict[str, Mode] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    "default dtype float64": setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device meta": setting(torch.set_default_device, "meta", None),
    "device context meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": setting(torch.use_deterministic_algorithms, True, False),
    "matmul precision": setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


def run(rule: UpdateRule, mode: Mode, built_inside: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and states after steps in the mode, of which one is outside of it."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(7, 5)), Parameter(torch.randn(3)), Parameter(torch.tensor(0.5))]
    grads = [[torch.randn(p.shape) for p in params] for _ in range(6)]
    with mode() if built_inside else nullcontext():
        opt = LearnedOptimizer(params, rule, weight_decay=0.1)
    for step, given in enumerate(grads):
        with mode() if step != (3 if built_inside else 0) else nullcontext():
            step_with(opt, *given)
    saved = opt.state_dict()["state"]
    return [p.detach().clone() for p in params], [v for s in saved.values() for v in s.values()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_step_does_not_depend_on_what_surrounds_it(rule: UpdateRule, mode: str) -> None:
    plain = run(rule, nullcontext, False)
    for built_inside in (False, True):
        for ours, theirs in zip(run(rule, MODES[mode], built_inside), plain, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_load_alike_in_every_mode(mode: str, tmp_path: Path) -> None:
    rule = load_rule("default-fast")
    save_rule(rule, tmp_path / "model.safetensors")
    with MODES[mode]():
        opt = LearnedOptimizer([Parameter(torch.zeros(2, device="cpu"))], tmp_path)
    assert opt.rule.fingerprint() == rule.fingerprint()
    assert all(w.device.type == "cpu" and w.dtype is torch.float32 for w in opt.rule.parameters())


def test_the_modes_are_as_before_after_a_step() -> None:
    model = small_net()
    opt = LearnedOptimizer(model.parameters())
    x, y = small_batch()
    dtypes = []

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(x)
        dtypes.append(out.dtype)
        loss = nn.functional.cross_entropy(out, y)
        loss.backward()
        return loss

    with MODES["matmul precision"](), torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(closure)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    assert dtypes == [torch.bfloat16]  # a closure keeps its autocast


# ---- parameters without values: memory estimators, deferred initialization


def test_steps_on_the_meta_device(rule: UpdateRule) -> None:
    model = nn.Linear(10, 3, device="meta")
    opt = LearnedOptimizer(model.parameters(), rule)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 10, device="meta")).sum().backward()
        opt.step()
    for state in opt.state.values():
        assert all(value.device.type == "meta" for value in state.values())
    assert opt.state_dict()["state"][0]["step"].shape == ()


def test_state_under_fake_tensors_has_the_real_sizes(rule: UpdateRule) -> None:
    """Built and stepped under a fake mode, as memory estimators do; nothing fake is remembered."""

    def states(mode: Mode) -> list[dict[str, Tensor]]:
        with mode():
            model = nn.Linear(10, 3)
            opt = LearnedOptimizer(model.parameters(), rule)
            for _ in range(2):
                opt.zero_grad()
                model(torch.ones(4, 10)).sum().backward()
                opt.step()
            return list(opt.state.values())

    fake, real = states(FakeTensorMode), states(nullcontext)
    assert all(isinstance(value, FakeTensor) for state in fake for value in state.values())
    sizes = [[{k: v.numel() for k, v in s.items()} for s in found] for found in (fake, real)]
    assert sizes[0] == sizes[1]


def test_fake_parameters_alone(rule: UpdateRule) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Linear(10, 3)
    opt = LearnedOptimizer(model.parameters(), rule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step_with(opt, *map(torch.empty_like, model.parameters()))
