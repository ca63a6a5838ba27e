"""The JSON Schema of recipe files, for editors and for programs that write recipes."""

from __future__ import annotations

from typing import Any

from learned_optim.meta.recipes import _base, _evolution
from learned_optim.rules import rule_class, rule_names

#: A rule of the user's own, "module:name".
_FOREIGN = {"type": "string", "pattern": "^[A-Za-z_][\\w.]*:.+$"}


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what :func:`recipe_from_json` reads.

    It has the fields, types and choices of recipes and of the registered update rules. Bounds and
    conditions between fields are checked when a recipe is read.
    """
    kinds = {"backpropagation": _base.Recipe, "evolution": _evolution.EvolutionRecipe}
    definitions: dict[str, Any] = {}
    for name, kind in kinds.items():
        schema = _schema(kind)
        definitions |= schema.pop("$defs")
        schema["properties"]["rule"] = _rule()
        definitions[name] = schema
    evolution = definitions["evolution"]
    evolution["properties"]["method"] = {"const": _evolution.METHOD}
    evolution["required"].append("method")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A meta-training recipe of learned_optim",
        "if": {"type": "object", "required": ["method"]},
        "then": {"$ref": "#/$defs/evolution"},
        "else": {"$ref": "#/$defs/backpropagation"},
        "$defs": definitions,
    }


def _schema(kind: type) -> dict[str, Any]:
    """The schema of a dataclass."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return TypeAdapter(with_config(config)(kind)).json_schema()


def _rule() -> dict[str, Any]:
    """An update rule: a name, or a table with a name and fields of its configuration."""
    classes = {name: rule_class(name) for name in rule_names()}
    own = {n: c.Config for n, c in classes.items() if c.__module__.startswith("learned_optim.")}
    tables = [({"const": name}, _schema(config)) for name, config in own.items()]
    return {
        "anyOf": [
            {"enum": list(own)},
            _FOREIGN,
            *(
                {
                    "type": "object",
                    "properties": {"name": name, "config": config},
                    "required": ["name"],
                    "additionalProperties": False,
                }
                for name, config in [*tables, (_FOREIGN, {"type": "object"})]
            ),
        ]
    }
