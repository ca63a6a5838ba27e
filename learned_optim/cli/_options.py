"""Options from the dataclasses that configure a command: one argument per field.

A field's annotation says how its option parses, the string under it what the option is for, and an
instance what its default is.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from learned_optim._fields import field_docs
from learned_optim.cli._parser import INDENT, Parser, help_width

T = TypeVar("T")

METAVARS: dict[type, str] = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


class Group(Protocol):
    """What arguments are added to: a parser, or a titled group of one."""

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action: ...


def add_fields(
    group: Group,
    config: Any,
    names: Iterable[str] | None = None,
    *,
    path: str = "",
    shown: Iterable[str] | None = None,
    values: bool = True,
) -> None:
    """Add an option for every field of a dataclass instance.

    Args:
        group: what they are added to.
        config: the instance, whose values are the defaults.
        names: fields to add, all that are no dataclasses themselves if not given.
        path: where the instance lies in the command's configuration, as ``"recipe.rule."``.
        shown: fields that help describes, all if not given; others parse as well.
        values: whether the defaults are worth showing.
    """
    docs, hints = field_docs(type(config)), get_type_hints(type(config))
    fields = {f.name: f for f in dataclasses.fields(config)}
    if names is None:
        names = [n for n in fields if not dataclasses.is_dataclass(getattr(config, n))]
    described = set(fields if shown is None else shown)
    for name in names:
        value = getattr(config, name)
        text = docs.get(name, "").replace("`", "")
        if values and value is not None:
            text = f"{text} ({_shown(value)})".strip()
        parse = fields[name].metadata.get("parse")
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=path + name,
            help=text.replace("%", "%%") if name in described else argparse.SUPPRESS,
            **(_own(parse, fields[name]) if parse else _arguments(hints[name])),
        )


def with_values(config: T, options: argparse.Namespace) -> T:
    """A configuration with the options that were given, whose ``dest`` is the path of a field.

    Raises:
        ValueError: of the configuration, about a value that it does not take.
    """
    given = {path: value for path, value in vars(options).items() if value is not None}
    return _replaced(config, given, "")


def _replaced(config: T, given: Mapping[str, Any], path: str) -> T:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        here, value = path + field.name, getattr(config, field.name)
        if here in given:
            found = given[here]
            changes[field.name] = tuple(found) if isinstance(found, list) else _or_none(found)
        elif dataclasses.is_dataclass(value) and any(g.startswith(here + ".") for g in given):
            changes[field.name] = _replaced(value, given, here + ".")
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


#: What ``None``, said on the command line, parses to: ``None`` itself means an option not given.
NOTHING = object()


def _or_none(value: Any) -> Any:
    return None if value is NOTHING else value


def _arguments(hint: Any) -> dict[str, Any]:
    """What ``add_argument`` takes for a field annotated with ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": args}
    if origin in (Union, types.UnionType):
        (kind,) = (arg for arg in args if arg is not type(None))
        return {**_arguments(kind), "type": _optional(kind)}
    if origin is tuple:
        return {"nargs": "*", "action": "extend", **_arguments(args[0])}
    return {"type": hint, "metavar": METAVARS[hint]}


def _own(parse: Callable[[str], Any], field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The same for a field that brings its parser, a function of a string, in its metadata."""

    def convert(text: str) -> Any:
        if text == "None":
            return NOTHING
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return {"type": convert, "metavar": field.metadata.get("metavar", "TEXT")}


def _optional(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return NOTHING if text == "None" else kind(text)

    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parsed(options: argparse.Namespace, config: T) -> T:
    """:func:`with_values`, where a value that does not fit is a usage error.

    Raises:
        SystemExit: with status 2, after saying what does not fit.
    """
    parser: Parser = options.parser
    try:
        return with_values(config, options)
    except ValueError as error:
        parser.error(str(error))


def entry(left: str, text: str) -> list[str]:
    """One name, and its description beside it or, if there is no room, below."""
    head, below = f"  {left}", _wrapped(text.replace("`", ""), INDENT)
    if not below or len(head) + 2 > INDENT:
        return [head, *below]
    first, *rest = below
    return [head.ljust(INDENT) + first.lstrip(), *rest]


def listing(names: Iterable[str], indent: int = 2) -> list[str]:
    """Names without descriptions, in lines."""
    return _wrapped(", ".join(names), indent)


def section(title: str, lines: Sequence[str]) -> str:
    """A titled group of lines, or nothing if there are none."""
    return "\n".join(["", f"{title}:", *lines, ""]) if lines else ""


def _wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(
        text,
        help_width(),
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    )
