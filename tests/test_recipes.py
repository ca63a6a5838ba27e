"""Recipes: those that ship, files, and errors about faults."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_trainer import SMALL

from learned_optim.meta import MetaTrainer, Recipe, load_recipe, recipes
from learned_optim.meta.recipes import recipe_from_json
from learned_optim.rules import RuleConfig
from learned_optim.rules._base import RULES
from learned_optim.rules.classical import SGDRule
from learned_optim.rules.equivariant import EquivariantConfig
from learned_optim.rules.lstm import LSTMConfig

TOML = """
task = "digits-torch"
epochs = 3
meta_lr = 1e-2
horizon = 50
clip_norm = 1.0

[rule]
name = "equivariant"
config = { hidden_size = 16, direct = true }
"""


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_data(name: str) -> None:
    data = json.loads(json.dumps(load_recipe(name).to_json()))
    assert recipe_from_json(data) == load_recipe(name)


def test_recipes_in_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe == Recipe(
        task="digits-torch", rule=EquivariantConfig(hidden_size=16, direct=True), epochs=3,
        meta_lr=0.01, horizon=50, clip_norm=1.0,
    )  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(recipe.to_json()))
    assert load_recipe(str(tmp_path / "mine.json")) == recipe
    (tmp_path / "short.toml").write_text(TOML.partition("[rule]")[0] + "rule = 'lstm'\n")
    assert load_recipe(str(tmp_path / "short.toml")).rule == LSTMConfig()
    MetaTrainer(SMALL, tmp_path / "run")
    assert load_recipe(str(tmp_path / "run")) == SMALL


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs", "epoch", r"unknown field 'epoch' of a recipe\. Did you mean 'epochs'\?"),
        ("meta_lr", "learning_rate", r"unknown field 'learning_rate' .*\. Fields: task, rule, met"),
        (
            "hidden_size",
            "hidden_sizes",
            r"of update rule 'equivariant'\. Did you mean 'hidden_size'\?",
        ),
        ("config", "configs", r"unknown field 'configs' of rule\. Did you mean 'config'\?"),
        ('"equivariant"', '"equivarant"', r"unknown update rule .* Did you mean 'equivariant'\?"),
        ('"equivariant"', '"nowhere:equivariant"', "no update rules from module 'nowhere'"),
        ("epochs = 3", "", "it lacks epochs"),
        ("epochs = 3", "epochs = '3'", "epochs must be int, got '3'"),
        ("epochs = 3", "epochs = ", "Invalid value"),
        ("{ hidden_size = 16, direct = true }", "3", "the config of a rule must be a table, got 3"),
    ],
)
def test_faults_of_a_recipe_file_are_named(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"mine\.toml: .*{message}"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"test_runs": 1}, "test_runs must be at least 2, got 1"),
        ({"meta_lr": float("nan")}, "meta_lr must be positive, got nan"),
        ({"long_fraction": 1.5}, r"long_fraction must be in \[0, 1\], got 1.5"),
        ({"long_fraction": 0.5}, "long_fraction=0.5 needs a long_horizon of at least horizon=10"),
        ({"average": 1.0}, r"average must be in \[0, 1\), got 1.0"),
        ({"estimator": "pes", "unrolls_per_run": 2}, "leave out unrolls_per_run=2"),
        ({"validation_mean": "median"}, "validation_mean must be one of 'arithmetic', 'geometric'"),
        ({"patience": 1.5}, r"patience must be int \| None, got 1.5"),
        ({"seed": True}, "seed must be int, got True"),
        ({"rule": LSTMConfig(output_scale="big")}, "output_scale must be float, got 'big'"),
        ({"rule": {}}, r"rule must be RuleConfig, got \{\}"),
    ],
)
def test_recipe_fields_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_lists_in_a_recipe_file_are_tuples_of_the_rule() -> None:
    @dataclass(frozen=True)
    class TupleConfig(RuleConfig):
        betas: tuple[float, ...] = (0.5, 0.75)

    class TupleRule(SGDRule):
        name = "with-a-tuple"
        Config = TupleConfig

    try:
        recipe = replace(SMALL, rule=TupleConfig((0.1, 0.2, 0.3)))
        data = json.loads(json.dumps(recipe.to_json()))
        assert data["rule"] == {
            "name": "test_recipes:with-a-tuple",
            "config": {"betas": [0.1, 0.2, 0.3]},
        }
        assert recipe_from_json(data) == recipe
    finally:
        del RULES["with-a-tuple"]
