"""One step of the optimizer: speed and memory against the plain implementation, and scaling."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measure import available_memory, in_child, in_turns, peak_memory
from benchmarks.plain import PlainOptimizer
from learned_optim import LearnedOptimizer, list_pretrained
from learned_optim.meta.runs import state_bytes
from learned_optim.pretrained import ALIASES
from learned_optim.rules import UpdateRule, build_rule, rule_class, rule_names
from learned_optim.rules._pieces import BLOCK as BLOCK_ROWS
from learned_optim.rules.lstm import LSTMRule

MILLION = 10**6
THESIS = [(20, 784), (20,), (10, 20), (10,)]
#: The learned rules, with weights that were never trained: what a step costs is not learned.
RULES = tuple(name for name in rule_names() if rule_class(name).rows != "none")
#: Bytes of state above which a size is extrapolated rather than measured.
LARGEST_STATE = 4 * 2**30
#: Coordinates on which the plain implementation is measured where all would not fit into memory.
SLICE = MILLION


def mixed() -> list[tuple[int, ...]]:
    """Shapes of a small convolutional trunk with two transformer blocks: 66 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    for inputs, width in ((64, 64), (64, 64), (64, 128), (128, 128), (128, 128)):
        shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3)]
        shapes += [(width,), (width,)]
    for _ in range(2):
        shapes += [(128,), (128,), (384, 128), (384,), (128, 128), (128,), (128,), (128,)]
        shapes += [(512, 128), (512,), (128, 512), (128,)]
    return [
        *shapes,
        (500, 128),
        (128,),
        (128,),
        (64, 128),
        (64,),
        (10, 128),
        (10,),
        (128, 64),
        (1,),
    ]


def size_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """Coordinates of all shapes together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.1 * torch.randn(s, generator=generator)) for s in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn(param.shape, generator=generator)
    return params


def fresh(rule: str) -> UpdateRule:
    """A rule of default size."""
    return build_rule(rule, {})


def products(n: int) -> Callable[[], None]:
    """The matrix products of one step of the 2x20 network on ``n`` coordinates, and nothing else.

    The same shapes in the same blocks as on the fast path.
    """
    rows = min(n, BLOCK_ROWS)
    x, gates, out = torch.randn(2, rows), torch.empty(80, rows), torch.empty(rows)
    hidden = torch.randn(40, n)
    inputs, recurrent, second = (torch.randn(80, k) for k in (2, 20, 40))
    readout, bias, one = torch.randn(20), torch.randn(80, 1), torch.randn(1)

    def run() -> None:
        for h in hidden.split(rows, 1):
            n = h.shape[1]
            g = gates if n == rows else gates.new_empty(80, n)
            torch.addmm(bias, inputs, x[:, :n], out=g).addmm_(recurrent, h[:20])
            torch.addmm(bias, second, h, out=g)
            torch.addmv(one, h[20:].t(), readout, out=out[:n])

    return run


def lstm_step() -> dict[str, Any]:
    """Target 1: the 2x20 network of the thesis."""
    rule = fresh("lstm")
    assert isinstance(rule, LSTMRule)
    found: dict[str, Any] = {"sizes": {}}
    sizes: dict[str, tuple[list[tuple[int, ...]], int]] = {
        "300": ([(300,)], 100),
        "3,000": ([(3000,)], 50),
        "9,000": ([(9000,)], 30),
        "784-20-10 network (15,910)": (THESIS, 20),
        "1,000,000": ([(MILLION,)], 3),
        "10,000,000": ([(10 * MILLION,)], 1),
    }
    for name, (shapes, rounds) in sizes.items():
        n = size_of(shapes)
        # Besides its new states, the plain one holds both halves of a layer's gates and their sum.
        plain_bytes = 4 * n * (2 * 80 + 3 * 80)
        plain = shapes if plain_bytes < 0.4 * available_memory() else [(SLICE,)]
        subjects: dict[str, Callable[[], object]] = {
            "fast": LearnedOptimizer(parameters(shapes), rule).step,
            "plain": PlainOptimizer(parameters(plain), rule).step,
            "products": products(min(n, SLICE)),
        }
        counts = {"fast": n, "plain": size_of(plain), "products": min(n, SLICE)}
        best = in_turns(subjects, rounds)
        row = {key: round(1e9 * value / counts[key], 2) for key, value in best.items()}
        found["sizes"][name] = {"coordinates": n, **row, "plain_in_slices": counts["plain"] < n}
        print(f"  {name}: {row}", flush=True)
        del subjects
    return found


def many_tensors() -> dict[str, Any]:
    """Target 1: the same coordinates in 66 tensors and in one, for every rule and Adam."""
    found = {}
    n = size_of(mixed())
    for rule in RULES:
        best = in_turns(
            {
                "many": LearnedOptimizer(parameters(mixed()), fresh(rule)).step,
                "one": LearnedOptimizer(parameters([(n,)]), fresh(rule)).step,
            },
            5,
        )
        found[rule] = {key: round(1e9 * value / n, 2) for key, value in best.items()}
    adam = [torch.optim.Adam(parameters(s), foreach=True).step for s in (mixed(), [(n,)])]
    best = in_turns({"many": adam[0], "one": adam[1]}, 10)
    found["adam, foreach"] = {key: round(1e9 * value / n, 2) for key, value in best.items()}
    print(f"  {found}", flush=True)
    return {"tensors": len(mixed()), "coordinates": n, "optimizers": found}


def peak_of_step(rule: str, n: int, plain: bool = False) -> int:
    """Bytes that a step needs besides parameters, gradients and state: run in a fresh process."""
    params = parameters([(n,)])
    if plain:
        lstm = fresh(rule)
        assert isinstance(lstm, LSTMRule)
        plain_optimizer = PlainOptimizer(params, lstm)
        return peak_memory(plain_optimizer.step)
    optimizer = LearnedOptimizer(params, fresh(rule))
    optimizer.step()  # makes the state
    return peak_memory(optimizer.step)


def temporaries() -> dict[str, Any]:
    """Target 1: memory beyond the state, at 1 and 10 million coordinates in one tensor."""
    found: dict[str, Any] = {}
    for rule, n in itertools.product(RULES, (MILLION, 10 * MILLION)):
        found.setdefault(rule, {})[str(n)] = in_child("benchmarks.step:peak_of_step", rule, n)
    found["plain 2x20"] = {
        str(MILLION): in_child("benchmarks.step:peak_of_step", "lstm", MILLION, True)
    }
    print(f"  {found}", flush=True)
    return found


def checkpoints() -> dict[str, Any]:
    """Targets 2 and 4: every shipped checkpoint beside Adam, at a million coordinates."""
    stood_for = ALIASES["default"]
    shipped = ["default", *(n for n in list_pretrained() if n not in {*ALIASES, stood_for})]
    rules: dict[str, Any] = {name: name for name in shipped}
    trained = {type(LearnedOptimizer(parameters([(1,)]), name).rule).name for name in shipped}
    rules |= {f"{rule} (untrained)": fresh(rule) for rule in RULES if rule not in trained}
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "adam, foreach": lambda params: torch.optim.Adam(params, foreach=True),
        "adam, plain": lambda params: torch.optim.Adam(params, foreach=False),
        "adam, fused": lambda params: torch.optim.Adam(params, fused=True),
    }
    for name, rule in rules.items():
        makers[name] = lambda params, rule=rule: LearnedOptimizer(params, rule)
        makers[f"{name}, bfloat16 state"] = lambda params, rule=rule: LearnedOptimizer(
            params, rule, state_dtype=torch.bfloat16
        )
    optimizers = {name: make(parameters([(MILLION,)])) for name, make in makers.items()}
    best = in_turns({name: each.step for name, each in optimizers.items()}, 4)
    found = {
        name: {
            "nanoseconds": round(1e9 * best[name] / MILLION, 2),
            "bytes_per_parameter": round(state_bytes(each) / MILLION, 2),
        }
        for name, each in optimizers.items()
    }
    print(f"  {found}", flush=True)
    return found


def scaling() -> dict[str, Any]:
    """Target 6: step time against the number of coordinates, in one tensor, on 1 and 2 threads.

    Two only where nobody else keeps a core busy: each would wait for the other.
    """
    cores = os.cpu_count() or 1
    threads = (1, 2) if cores > 1 and os.getloadavg()[0] < 0.5 * cores else (1,)
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "adam, foreach": lambda params: torch.optim.Adam(params, foreach=True),
        **{rule: lambda params, rule=rule: LearnedOptimizer(params, fresh(rule)) for rule in RULES},
    }
    found: dict[str, Any] = {name: {} for name in makers}
    for name, make in makers.items():
        small = make(parameters([(1000,)]))
        small.step()
        per_coordinate = state_bytes(small) / 1000
        for exponent in range(4, 9):
            n = 10**exponent
            # Parameter, gradient and state have to fit, and others use the machine as well.
            needed = (per_coordinate + 8) * n
            if needed > min(LARGEST_STATE, 0.5 * available_memory()):
                continue
            optimizer = make(parameters([(n,)]))
            rounds = 20 if n <= 10**5 else 5 if n <= MILLION else 2 if n <= 10 * MILLION else 1
            row = {}
            for count in threads:
                seconds = in_turns({name: optimizer.step}, rounds, count)[name]
                row[str(count)] = round(1e9 * seconds / n, 2)
            found[name][str(n)] = row
            print(f"  {name}, {n:,}: {row}", flush=True)
    return found
