"""What a GPU has to show: that steps are right there, and how long they take.

    python -m benchmarks gpu         # minutes; writes docs/performance/gpu.json

Checks hold steps on the device against the pure form on the CPU. Times are means over the steps
between two refreshes of an old basis. Without a GPU, `TRITON_INTERPRET=1` and `--device cpu` make
the checks on the CPU, in Triton's interpreter, and write nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from benchmarks.common import PERFORMANCE, machine, parameters, save
from benchmarks.cost import OLD
from benchmarks.memory import decoder, gpt2
from learned_optim import LearnedOptimizer
from learned_optim.kernels import _cpu, _gpu
from learned_optim.pretrained import ALIASES
from learned_optim.rules._basis import LONGEST_PERIOD
from learned_optim.summary import table

OUTPUT = PERFORMANCE / "gpu.json"
SHAPES: list[tuple[int, ...]] = [(24, 16), (16,), (40, 3), (8, 4, 3, 3), ()]
STEPS = 12
#: Largest difference of parameters, in the unit of the largest.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DEFAULT, FAST = ALIASES["default"], ALIASES["default-fast"]

Step = Callable[[], None]


def trained(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Step], Step] = lambda step: step,
    sharded: bool = False,
) -> list[Tensor]:
    """Returns parameters after :data:`STEPS` steps on gradients that are the same everywhere.

    ``wrap`` is given the step when the state is there.
    """

    def placed(value: Tensor) -> Tensor:
        value = value.detach().to(device, dtype)
        if not sharded:
            return value
        return distribute_tensor(value, mesh, [Shard(0) if value.dim() else Replicate()])

    mesh = init_device_mesh(device, (1,)) if sharded else None
    params = [nn.Parameter(placed(param)) for param in parameters(SHAPES)]
    optimizer = LearnedOptimizer(params, name, total_steps=STEPS)
    step: Step = optimizer.step
    generator = torch.Generator().manual_seed(0)
    means = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for index in range(STEPS):
        for param, mean in zip(params, means, strict=True):
            grad = placed(mean + torch.randn(mean.shape, generator=generator))
            if index == 0:
                param.grad = grad
            else:
                param.grad.copy_(grad)  # type: ignore[union-attr]
        step = wrap(step) if index == 2 else step
        step()
    return [(p.full_tensor() if sharded else p).detach().float().cpu() for p in params]  # type: ignore[operator]


def pure(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns the same from the pure form on the CPU."""
    off = partial(mock.patch.object, _cpu)
    with off("step_", lambda *_: False), off("bind", lambda *_: None):
        return trained(name, "cpu", dtype)


def without_waiting(step: Step) -> Step:
    """Returns the step, in which the host may not wait for the device."""

    def quiet() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return quiet


def captured(step: Step) -> Step:
    """Returns the replay of a CUDA graph of the step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def checks(device: str) -> dict[str, float]:
    """Returns the largest difference of every check, in units of its tolerance."""
    found: dict[str, float] = {}

    def check(label: str, name: str, dtype: torch.dtype = torch.float32, **how: Any) -> None:
        pairs = zip(trained(name, device, dtype, **how), pure(name, dtype), strict=True)
        worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        found[f"{label}, {name}"] = worst / TOLERANCES[dtype]

    for name in (DEFAULT, FAST):
        for dtype in TOLERANCES:
            check(str(dtype).removeprefix("torch."), name, dtype)
        if device == "cuda":
            check("torch.compile", name, wrap=partial(torch.compile, fullgraph=True))
            check("no waiting", name, wrap=without_waiting)
    if device == "cuda":
        check("CUDA graph", FAST, wrap=captured)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/store", rank=0, world_size=1)
        check(f"sharded, {backend}", DEFAULT, sharded=True)
        dist.destroy_process_group()
    return found


def makers(model: Any) -> dict[str, Callable[[list[nn.Parameter]], list[Step]]]:
    """Returns the steps of every optimizer, of the parameters of a model of ``memory``."""
    hidden = [not tensor.adam for tensor in model]

    def adam(params: list[nn.Parameter]) -> list[Step]:
        return [torch.optim.Adam(params, fused=True).step]

    def muon(params: list[nn.Parameter]) -> list[Step]:
        own = [p for p, is_hidden in zip(params, hidden, strict=True) if is_hidden]
        others = [p for p, is_hidden in zip(params, hidden, strict=True) if not is_hidden]
        return [torch.optim.Muon(own).step, *adam(others)]

    def soap(params: list[nn.Parameter]) -> list[Step]:
        from pytorch_optimizer import SOAP

        return [SOAP(params, max_precondition_dim=10_000).step]

    def learned(name: str, params: list[nn.Parameter]) -> list[Step]:
        optimizer = LearnedOptimizer(params, name, total_steps=10**5)
        optimizer.step()
        for state in optimizer.state.values():
            if "basis_age" in state:
                state["basis_age"].fill_(OLD)
        return [optimizer.step]

    own = {name: partial(learned, name) for name in (DEFAULT, FAST)}
    return {"Adam, fused": adam, "Muon": muon, "SOAP": soap, **own}


def milliseconds(steps: list[Step]) -> float:
    """Returns the mean time of a step by the clock, after one period to warm up."""
    started = 0.0
    for count in range(2 * LONGEST_PERIOD):
        if count == LONGEST_PERIOD:
            torch.cuda.synchronize()
            started = time.perf_counter()
        for step in steps:
            step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / LONGEST_PERIOD


def times() -> list[dict[str, Any]]:
    """Returns milliseconds by model and optimizer; ``None`` where the memory is too small."""
    rows = []
    for label, model in (("GPT-2, 124M", gpt2()), ("decoder, 1B", decoder())):
        row: dict[str, Any] = {"": label}
        for name, make in makers(model).items():
            params = [nn.Parameter(torch.randn(t.shape, device="cuda")) for t in model]
            for param in params:
                param.grad = torch.randn_like(param)
            try:
                row[name] = milliseconds(make(params))
            except torch.cuda.OutOfMemoryError:
                row[name] = None
            del params
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


def run(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        with mock.patch.object(_cpu, "step_", _gpu.step_):  # which pure() switches off
            found = checks("cpu")
    else:
        found, rows = checks("cuda"), times()
        gpu = {**machine(), "gpu": torch.cuda.get_device_name()}
        save(OUTPUT, {"machine": gpu, "checks": found, "milliseconds": rows})
        print(table([*rows[0]], [[str(cell) for cell in row.values()] for row in rows]))
    print(*(f"{label}: {worst:.2g} of the tolerance" for label, worst in found.items()), sep="\n")
    if failed := [label for label, worst in found.items() if not worst <= 1]:
        raise SystemExit(f"beyond their tolerance: {', '.join(failed)}")
