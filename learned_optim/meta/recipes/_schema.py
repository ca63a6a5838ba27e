"""The JSON Schema of recipe files, for editors and for programs that write recipes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from learned_optim._fields import field_docs
from learned_optim.meta.recipes import _base, _evolution
from learned_optim.rules import rule_class, rule_names

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}

#: Names of rules and tasks of one's own.
_FOREIGN = {"type": "string", "pattern": "^[A-Za-z_][\\w.]*:.+$"}


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what :func:`recipe_from_json` reads.

    It knows fields, types, choices, least values and the update rules that are registered now. What
    holds between fields, ``long_horizon`` and ``horizon`` say, :class:`Recipe` checks.
    """
    definitions = {
        "backpropagation": _object(_base.Recipe, _base._AT_LEAST),
        "evolution": _object(_evolution.EvolutionRecipe, _evolution._AT_LEAST),
        "rule": _rules(),
    }
    for name in ("backpropagation", "evolution"):
        definitions[name]["properties"]["rule"] = {"$ref": "#/$defs/rule"}
    properties = definitions["evolution"]["properties"]
    properties["method"] = {"const": _evolution.METHOD}
    definitions["evolution"]["required"].append("method")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A meta-training recipe of learned_optim",
        "if": {"type": "object", "required": ["method"]},
        "then": {"$ref": "#/$defs/evolution"},
        "else": {"$ref": "#/$defs/backpropagation"},
        "$defs": definitions,
    }


def _rules() -> dict[str, Any]:
    """An update rule: a name, or a table with a name and fields of its configuration."""
    tables: list[dict[str, Any]] = []
    for name in rule_names():
        cls = rule_class(name)
        if cls.__module__.startswith("learned_optim."):
            config = _object(cls.Config, {}, partial=True)
            tables.append(_table({"name": {"const": name}, "config": config}, ["name"]))
    tables.append(_table({"name": _FOREIGN, "config": {"type": "object"}}, ["name"]))
    names = {"enum": [table["properties"]["name"]["const"] for table in tables[:-1]]}
    return {"anyOf": [names, _FOREIGN, *tables]}


def _table(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _object(cls: type, at_least: Mapping[str, int], partial: bool = False) -> dict[str, Any]:
    """The schema of a dataclass.

    Args:
        cls: the dataclass.
        at_least: least values, by field.
        partial: no field is required.
    """
    docs, hints = field_docs(cls), get_type_hints(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        schema = _value(hints[field.name], at_least.get(field.name))
        if field.name in docs:
            schema["description"] = docs[field.name]
        if field.default is dataclasses.MISSING or field.name == "kind":
            required += [] if partial else [field.name]
        elif field.default is None or isinstance(field.default, (bool, int, float, str)):
            schema["default"] = field.default
        properties[field.name] = schema
    return _table(properties, required)


def _value(hint: Any, least: float | None = None) -> dict[str, Any]:
    """The schema of values annotated with ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_value(arg, least) for arg in args]}
    if origin is tuple:
        return {"type": "array", "items": _value(args[0])}
    if hint is type(None):
        return {"type": "null"}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _object(hint, {})
    schema: dict[str, Any] = {"type": _TYPES[hint]} if hint in _TYPES else {}
    if hint is Path:
        schema = {"type": "string"}
    if least is not None and hint in (int, float):
        schema["minimum"] = least
    return schema
