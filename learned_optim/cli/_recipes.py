"""Options of the command ``train``, which starts with a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learned_optim.cli._options import add_fields, entry
from learned_optim.cli._parser import HELP, Parser, peek

if TYPE_CHECKING:
    from learned_optim.meta.recipes import AnyRecipe


def source_of(args: Sequence[str]) -> str:
    """The recipe, which comes first; an empty string if there is none."""
    return args[0] if args and not args[0].startswith("-") else ""


def configure(
    parser: Parser, command: str, args: Sequence[str], kind: type, evolution: type | None
) -> None:
    """Add the recipe, and an option for every field of it and of the command's configuration.

    Args:
        parser: of the command.
        command: its name.
        args: its arguments.
        kind: its configuration for recipes of backpropagation.
        evolution: the same for recipes of evolution strategies, if it knows those.

    Raises:
        ValueError: no such recipe, one of a method the command does not know, an option before the
            recipe, or an option of the other method.
    """
    from learned_optim.meta.recipes import EvolutionRecipe, load_recipe, recipes, rule_config

    source = source_of(args)
    helping = not args or any(flag in HELP for flag in args)
    if not source and not helping:
        raise ValueError(
            f"{command} takes the recipe first, then the options: learned-optim {command} RECIPE "
            f"{args[0]} ..."
        )
    recipe = load_recipe(source) if source else recipes()["coordinatewise"]
    evolves = isinstance(recipe, EvolutionRecipe)
    if evolves and evolution is None:
        raise ValueError(
            f"{command} takes no recipe of evolution strategies, and {source!r} is one: it goes "
            f"with learned-optim train"
        )
    rule = peek(args[1:], "--rule", "the name of an update rule, or module:name")
    if rule is not None and source:
        recipe = replace(recipe, rule=rule_config(rule))
    chosen = evolution if evolves and evolution is not None else kind
    if evolves:
        _check_applies(args[1:], chosen, recipe, kind, source)
    config = chosen(recipe=recipe, folder=run_folder(command, source or "NAME"))
    parser.usage = f"learned-optim {command} {source or 'RECIPE'} [options]"
    parser.set_defaults(template=config)
    everything = "--help-all" in args
    _add_arguments(parser, config, source, everything)
    if not source:
        parser.epilog = f"{_recipe_list()}\n{parser.epilog}"
    if not everything:
        more = f"learned-optim {command} {source or 'RECIPE'} --help-all"
        parser.epilog = f"{parser.epilog}\nEvery field of a recipe is an option: {more}"


def _add_arguments(parser: Parser, config: Any, source: str, everything: bool) -> None:
    parser.add_argument(
        "source",
        metavar="RECIPE",
        nargs="?",
        help="the name of one that ships, a TOML or JSON file, or a run folder",
    )
    parser.add_argument("--help-all", action="help", help="every option, by group")
    add_fields(parser, config, [f.name for f in fields(config) if f.name not in ("recipe", "data")])
    shown = None if everything else ()
    _add_recipe(parser, config.recipe, bool(source), everything)
    if source:
        group = parser.add_argument_group("the update rule")
        add_fields(group, config.recipe.rule, path="recipe.rule.", shown=shown)
    group = parser.add_argument_group("data")
    add_fields(group, config.data, path="data.", shown=shown)


def _add_recipe(parser: Parser, recipe: AnyRecipe, known: bool, everything: bool) -> None:
    """Options of a recipe's fields: the most common ones in one group, or all in several."""
    from learned_optim.meta.recipes import (
        COMMON,
        EVOLUTION_COMMON,
        EVOLUTION_GROUPS,
        GROUPS,
        EvolutionRecipe,
    )

    evolves = isinstance(recipe, EvolutionRecipe)
    common = EVOLUTION_COMMON if evolves else COMMON
    groups: Mapping[str, Sequence[str]] = EVOLUTION_GROUPS if evolves else GROUPS
    if everything:
        groups = {"what is trained": (), **groups}
    else:
        groups = {"the recipe": common}
        hidden = [f.name for f in fields(recipe) if f.name not in (*common, "rule")]
        add_fields(parser, recipe, hidden, path="recipe.", shown=())
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        add_fields(group, recipe, names, path="recipe.", values=known)
        if title in ("the recipe", "what is trained"):
            _add_rule(group)


def _add_rule(group: Any) -> None:
    group.add_argument(
        "--rule", metavar="NAME", help="Update rule, or module:name for one of your own."
    )


def _recipe_list() -> str:
    from learned_optim.meta.recipes import recipe_descriptions

    described = recipe_descriptions().items()
    lines = [line for name, text in described for line in entry(name, text)]
    return "\n".join(["recipes:", *lines, ""])


def _check_applies(
    args: Sequence[str], kind: type, recipe: AnyRecipe, other: type, source: str
) -> None:
    """Tell an option of recipes of backpropagation from one that does not exist.

    Raises:
        ValueError: an option that recipes of evolution strategies do not have.
    """
    from learned_optim.meta.recipes import Recipe

    def names(*classes: Any) -> set[str]:
        return {f.name for cls in classes for f in fields(cls)} - {"recipe", "rule", "data"}

    known = names(kind, type(recipe))
    for arg in args:
        flag = arg.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in names(other, Recipe) - known:
            options = ", ".join(f"--{n.replace('_', '-')}" for n in sorted(known))
            raise ValueError(
                f"{flag} does not apply to {source!r}, a recipe of evolution strategies, which "
                f"takes {options}"
            )


def run_folder(command: str, source: str) -> Path:
    """Where a command puts its files unless told: a run folder's recipe goes on in that folder."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent if path.name == "recipe.json" else None
    if folder is not None and command == "train" and _is_run(folder):
        return folder
    name = folder.resolve().name if folder is not None else path.stem
    return Path("runs") / name


def _is_run(folder: Path) -> bool:
    from learned_optim.meta.run_folder import RunFolder

    return RunFolder.is_one(folder)


def no_recipe(options: argparse.Namespace) -> bool:
    """Whether no recipe was given; help, which lists them, is printed then."""
    if options.source is None:
        options.parser.print_help()
        return True
    return False
