"""The published schema of recipes agrees with what reads them."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from learned_optim.cli import main
from learned_optim.meta.recipes import load_recipe, recipe_from_json, recipe_schema, recipes

TOML_LIKE: dict[str, Any] = {"task": "digits", "rule": "equivariant", "epochs": 2, "meta_lr": 0.01}
EVOLUTION: dict[str, Any] = {
    "method": "evolution", "rule": "horizon", "meta_steps": 2, "meta_lr": 0.01, "meta_lr_final": 0,
}  # fmt: skip


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(recipe_schema())


def valid(data: Mapping[str, Any]) -> bool:
    return validator().is_valid(data)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_valid(name: str) -> None:
    assert valid(json.loads(json.dumps(recipes()[name].to_json())))


@pytest.mark.parametrize("data", [TOML_LIKE, EVOLUTION], ids=["backpropagation", "evolution"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rule": {"name": "equivariant", "config": {"hidden_size": 4}}},
        {"rule": {"name": "my_rules:mine", "config": {"anything": 4}}},
        {"seed": 3},
        {"seed": -1},
        {"seed": "three"},
        {"sead": 3},
        {"meta_lr": None},
        {"rule": "nonesuch"},
        {"rule": {"name": "equivariant", "config": {"hiden_size": 4}}},
        {"rule": {"name": "equivariant", "conf": {}}},
        {"rule": {"name": "equivariant", "config": {"hidden_size": "four"}}},
        {"task": "populations"},
        {"method": "backpropagation"},
        {"validation_runs": 1},
        {"patience": None},
        {"clip_norm": 1},
        {"estimator": "guess"},
        {"relative_loss": 1},
        {"epochs": 0},
        {"sigma": 0.1},
    ],
    ids=str,
)
def test_schema_accepts_what_reads_and_refuses_what_does_not(
    data: dict[str, Any], change: dict[str, Any]
) -> None:
    changed = {**data, **change}
    if ":" in str(changed["rule"]) and "my_rules" in str(changed["rule"]):
        assert valid(changed)  # no such module here
        return
    try:
        recipe_from_json(changed)
        reads = True
    except ValueError:
        reads = False
    # A seed below 0 is an error of evolution strategies alone.
    assert valid(changed) == reads


@pytest.mark.parametrize("missing", ["task", "rule", "epochs", "meta_lr"])
def test_required_fields(missing: str) -> None:
    data = {key: value for key, value in TOML_LIKE.items() if key != missing}
    assert not valid(data)
    with pytest.raises(ValueError, match=f"lacks {missing}|{missing}"):
        recipe_from_json(data)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


PAGE = Path(__file__).parent.parent / "docs" / "meta-training.md"
TOML = re.compile(r'^```toml title="[\w-]+\.toml"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def test_recipe_in_the_documentation(tmp_path: Path) -> None:
    (text,) = TOML.findall(PAGE.read_text())
    (tmp_path / "my-recipe.toml").write_text(text)
    recipe = load_recipe(str(tmp_path / "my-recipe.toml"))
    assert valid(json.loads(json.dumps(recipe.to_json())))
