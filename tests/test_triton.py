"""The Triton step: its kernels are interpreted in another process, and compiled for GPUs here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import python

from learned_optim import kernels
from learned_optim.kernels import _build, _gpu

triton = pytest.importorskip("triton", reason="triton is not installed")

ENVIRONMENT = {"TRITON_INTERPRET": "1", _build.SWITCH: "1", "PYTEST_ADDOPTS": ""}
TESTS = Path(__file__).parent
POINTERS = {
    "addresses": "*i64", "integers": "*i64", "constants": "*fp64", "gains": "*fp64",
    "counters": "*i32", "chunk_tensor": "*i32", "partials": "*fp32", "lr_pointer": "*fp32",
    "hidden": "*fp32", "hidden_bias": "*fp32", "readout": "*fp32", "readout_bias": "*fp32",
    "direct": "*fp32",
}  # fmt: skip


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    # Triton is interpreted if the variable is set before anything imports it.
    options = ("-q", "-x", "-p", "no:cacheprovider", TESTS / "triton_interpreted.py")
    python("-m", "pytest", *options, folder=TESTS.parent, **ENVIRONMENT)


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    """The kernel for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {**POINTERS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.slow
@pytest.mark.skipif(_gpu.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "name"), [(80, "float32"), (90, "bfloat16")])
def test_the_kernels_compile_for_gpus(capability: int, name: str) -> None:
    found, kind = _gpu.loaded()[0], _gpu._triton_type(getattr(torch, name))
    gains = compiled(
        found.gains_kernel,
        {"PARAM_TYPE": kind, "UNITS": 16, "OWN_NETWORKS": 0, "LR_ON_DEVICE": True, "BLOCK": 1024},
        capability,
    )  # fmt: skip
    update = compiled(
        found.update_kernel,
        {"PARAM_TYPE": kind, "STATE_TYPE": kind, "KNOWN": True, "CHUNK": _gpu.CHUNK,
         "BLOCK": _gpu.BLOCK, "ALIGNED": True},
        capability,
    )  # fmt: skip
    assert "cos" in gains.asm["ttir"]
    code = update.asm["ptx"]
    # Several coordinates per load; sums are stored by all threads before the chunk is counted.
    assert "ld.global.v" in code
    assert code.index("bar.sync") < code.index("atom.global.gpu.acq_rel.add")


def test_other_devices_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.status("mps").startswith("missing")
    monkeypatch.setenv(_build.SWITCH, "1")
    assert kernels.status("cuda").startswith("triton")
    monkeypatch.setenv(_build.SWITCH, "0")
    assert kernels.status("cuda") == f"off: {_build.SWITCH}=0"
