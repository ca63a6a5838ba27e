"""The public surface is listed and documented."""

import inspect
from importlib.resources import files
from types import ModuleType

import pytest

import learned_optim
from learned_optim import LearnedOptimizer, rules


@pytest.mark.parametrize("module", [learned_optim, rules], ids=lambda module: module.__name__)
def test_public_names_are_there_and_documented(module: ModuleType) -> None:
    for name in module.__all__:
        thing = getattr(module, name)
        assert name in ("__version__", "State") or inspect.getdoc(thing), name
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == {name for name in module.__all__ if not name.startswith("__")}
    assert files("learned_optim").joinpath("py.typed").is_file()


def test_no_keyword_is_one_that_trainers_take_for_themselves() -> None:
    """Hugging Face's Trainer pops these from the keyword arguments it passes on."""
    keywords = set(inspect.signature(LearnedOptimizer.__init__).parameters) - {"self", "params"}
    assert not keywords & {"params", "model", "optimizer_dict"}
