"""Help of the command line from the dataclasses that its options are generated from.

``tyro`` parses the options, and comes with an extra; help is to be had without it, and short.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Column in which descriptions begin.
INDENT = 30


def field_docs(cls: type) -> dict[str, str]:
    """The strings under a dataclass's fields, by field; bases of the class included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # an installation without sources: options without descriptions
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found


def options(config: Any, names: Sequence[str] | None = None, values: bool = True) -> list[str]:
    """Lines of help on the fields of a dataclass instance.

    Args:
        config: the instance, whose values are the defaults.
        names: fields to describe, all that are no dataclasses themselves if not given.
        values: whether the defaults are worth showing.
    """
    docs, hints = field_docs(type(config)), get_type_hints(type(config))
    if names is None:
        names = [f.name for f in dataclasses.fields(config) if not _nested(getattr(config, f.name))]
    lines = []
    for name in names:
        value, hint = getattr(config, name), hints[name]
        flag = f"--{name.replace('_', '-')}"
        text = docs.get(name, "")
        if hint is bool:
            left, shown = (f"--[no-]{flag[2:]}", "on") if value else (flag, None)
        else:
            left, shown = f"{flag} {_metavar(hint)}", None if value is None else _shown(value)
        if values and shown is not None:
            text = f"{text} ({shown})".strip()
        lines += entry(left, text)
    return lines


def entry(left: str, text: str) -> list[str]:
    """One option or name, and its description beside it or, if there is no room, below."""
    head, below = f"  {left}", _wrapped(text.replace("`", ""), INDENT)
    if not below or len(head) + 2 > INDENT:
        return [head, *below]
    first, *rest = below
    return [head.ljust(INDENT) + first.lstrip(), *rest]


def listing(names: Iterable[str], indent: int = 2) -> list[str]:
    """Names without descriptions, in lines."""
    return _wrapped(", ".join(names), indent)


def _wrapped(text: str, indent: int) -> list[str]:
    width, margin = max(60, min(100, shutil.get_terminal_size().columns)), " " * indent
    return textwrap.wrap(
        text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )


def section(title: str, lines: Sequence[str]) -> str:
    """A titled group of lines, or nothing if there are none."""
    return "\n".join(["", f"{title}:", *lines, ""]) if lines else ""


def sections(groups: Mapping[str, Sequence[str]]) -> str:
    """Several groups behind each other."""
    return "".join(section(title, lines) for title, lines in groups.items())


def _nested(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _metavar(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (Union, types.UnionType):
        return _metavar(next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        return f"[{_metavar(args[0])} ...]"
    known = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
    return known.get(hint, "VALUE")


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
