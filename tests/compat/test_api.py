"""The public surface: listed, documented, typed, and light to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.resources import files
from types import ModuleType

import pytest

import learned_optim
from learned_optim import LearnedOptimizer, rules

MODULES = [learned_optim, rules]
PUBLIC = [
    (module, name) for module in MODULES for name in module.__all__ if not name.startswith("__")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_lists_what_is_there(module: ModuleType) -> None:
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == {name for name in module.__all__ if not name.startswith("__")}


def functions_of(thing: object) -> list[tuple[str, object]]:
    """A function itself, or a class's own public functions and constructor."""
    if not inspect.isclass(thing):
        return [(getattr(thing, "__name__", ""), thing)]
    own = [thing.__dict__.get("__init__"), *vars(thing).values()]
    found = [value for value in own if inspect.isfunction(value)]
    return [(f.__name__, f) for f in found if not f.__name__.startswith("_") or f is own[0]]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_names_are_documented_and_typed(module: ModuleType, name: str) -> None:
    thing = getattr(module, name)
    if name == "State":  # an alias of a dict type has no documentation of its own
        return
    assert inspect.getdoc(thing)
    for function_name, function in functions_of(thing):
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        untyped = [p.name for p in named if p.annotation is inspect.Parameter.empty]
        assert not untyped, (function_name, untyped)
        assert signature.return_annotation is not inspect.Signature.empty, function_name


def test_the_package_says_that_it_is_typed() -> None:
    assert files("learned_optim").joinpath("py.typed").is_file()


def test_no_keyword_is_one_that_trainers_take_for_themselves() -> None:
    """Hugging Face's Trainer pops these from the keyword arguments it passes on."""
    keywords = set(inspect.signature(LearnedOptimizer.__init__).parameters) - {"self", "params"}
    assert not keywords & {"params", "model", "optimizer_dict"}


def test_importing_loads_no_trainer_and_no_network_client() -> None:
    code = "import sys, learned_optim; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"huggingface_hub", "transformers", "lightning", "accelerate", "matplotlib"}
    assert not heavy & set(done.stdout.split())
