"""Recipes by name and in files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from learned_optim._discovery import did_you_mean, import_submodules, unknown_name
from learned_optim.meta.recipes._base import METHOD, AnyRecipe, EvolutionRecipe, Recipe
from learned_optim.rules import RuleConfig, build_rule, rule_class


def rule_config(name: str, values: dict[str, Any] | None = None) -> RuleConfig:
    """The configuration of an update rule from its name and plain data.

    Args:
        name: a registered name, or ``"module:name"`` for a rule that an importable module defines.
        values: fields that differ from their defaults.

    Raises:
        ValueError: no such module or rule, or unknown or unfit fields.
    """
    module, _, own = name.rpartition(":")
    if module:
        import_rules(module)
    values = values or {}
    if not isinstance(values, dict):
        raise ValueError(f"the config of a rule must be a table, got {values!r}")
    known = [field.name for field in dataclasses.fields(rule_class(own).Config)]
    check_names(values, known, f"update rule {own!r}")
    config: RuleConfig = build_rule(own, values).config
    return config


def check_names(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise ``ValueError`` for a name that is not ``known``; it says the nearest that is."""
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or f". Fields: {', '.join(known) or 'none'}"
            raise ValueError(f"unknown field {name!r} of {what}{near}")


def import_rules(module: str) -> None:
    """Import a module of the user's that defines update rules.

    Raises:
        ValueError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"no update rules from module {module!r} ({error}): it must be importable (PYTHONPATH)"
        ) from error


def recipe_from_json(data: dict[str, Any]) -> AnyRecipe:
    """A recipe from the data of a recipe file, the inverse of :meth:`Recipe.to_json`.

    ``method = "evolution"`` selects :class:`EvolutionRecipe`. ``rule`` is a table of ``name`` and
    ``config``, or the name alone.

    Raises:
        ValueError: unknown or missing fields, or values that do not fit them.
    """
    if not isinstance(data, dict):
        raise ValueError(f"not a recipe: a table of fields is one, got {str(data)[:40]}")
    data = dict(data)
    method = data.pop("method", None)
    if method not in (None, METHOD):
        raise ValueError(f"not a recipe: unknown method {method!r}; known: {METHOD}")
    kind: type[AnyRecipe] = Recipe if method is None else EvolutionRecipe
    known = dataclasses.fields(kind)
    check_names(data, [field.name for field in known], "a recipe")
    missing = [f.name for f in known if f.name not in data and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"not a recipe: it lacks {', '.join(missing)}")
    try:
        rule = data["rule"]
        if isinstance(rule, str):
            rule = {"name": rule}
        check_names(rule, ("name", "config"), "rule")
        config = rule_config(rule["name"], rule.get("config"))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"not a recipe: rule: {error}") from error
    return kind(**{**data, "rule": config})


def recipes() -> dict[str, AnyRecipe]:
    """The recipes that ship with the package, by name: each module's ``RECIPE``."""
    return {name: module.RECIPE for name, module in _modules().items()}


def recipe_descriptions() -> dict[str, str]:
    """The purpose of every shipped recipe in a sentence, by name."""
    return {
        name: (module.__doc__ or "").partition("\n\n")[0].strip().replace("\n", " ")
        for name, module in _modules().items()
    }


def _modules() -> dict[str, ModuleType]:
    modules = import_submodules("learned_optim.meta.recipes")
    return {module.__name__.rsplit(".", 1)[1].replace("_", "-"): module for module in modules}


def load_recipe(source: str) -> AnyRecipe:
    """A recipe by shipped name, from a TOML or JSON file, or from a run folder.

    Raises:
        ValueError: neither a shipped name nor a readable recipe file; the message names the file.
        FileNotFoundError: a path to a file that does not exist.
        ImportError: a TOML file under Python 3.10 without the ``meta`` extra.
    """
    known = recipes()
    if source in known:
        return known[source]
    path = Path(source)
    if path.is_dir():
        path = path / "recipe.json"
    if path.suffix in (".json", ".toml") and not path.is_file():
        raise FileNotFoundError(f"no recipe file at {path}")
    if path.suffix not in (".json", ".toml"):
        if path.name != source:
            raise FileNotFoundError(f"no recipe file or run folder at {path}")
        raise unknown_name("recipe", source, list(known))
    try:
        return recipe_from_json(_parsed(path))
    except ValueError as error:
        remedy = ""
        if Path(source).is_dir():  # a run folder, whose recipe is its own record
            remedy = (
                f". If it is damaged, delete it, and start the run again by the recipe that it "
                f"began with and --folder {source}: nothing else of the run is lost"
            )
        raise ValueError(f"{path}: {error}{remedy}") from error


def _parsed(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))
