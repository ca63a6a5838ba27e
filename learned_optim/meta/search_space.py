"""What a search may change in a recipe, written as ``meta_lr=log:1e-5:1``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from learned_optim._discovery import did_you_mean
from learned_optim.meta.recipes import Recipe

if TYPE_CHECKING:
    import optuna

FORMS = "FIELD=log:LOW:HIGH, FIELD=float:LOW:HIGH, FIELD=int:LOW:HIGH or FIELD=choice:A,B,..."


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One field of a recipe and the values that a search tries.

    Attributes:
        name: of the field; those of the update rule begin with ``rule.``.
        kind: ``"log"`` (log-uniform), ``"float"``, ``"int"`` or ``"choice"``.
        bounds: smallest and largest value; empty for a choice.
        choices: the values of a choice.
    """

    name: str
    kind: str
    bounds: tuple[float, ...] = ()
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value of the trial."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.choices)
        low, high = self.bounds
        if self.kind == "int":
            return trial.suggest_int(self.name, int(low), int(high))
        value = trial.suggest_float(self.name, low, high, log=self.kind == "log")
        # Two digits are plenty of a size, and can be copied from the screen.
        return float(f"{value:.2g}") if self.kind == "log" else value

    @property
    def flag(self) -> str:
        """The option of ``learned-optim train`` that sets the field."""
        return "--" + self.name.removeprefix("rule.").replace("_", "-")


def parse_dimension(text: str, recipe: Recipe) -> Dimension:
    """A dimension as it is written on the command line.

    Raises:
        ValueError: the text is none, the recipe has no such field, or the field cannot take the
            values.
    """
    name, equals, values = text.partition("=")
    kind, _, rest = values.partition(":")
    name = name.replace("-", "_")
    names = [f.name for f in dataclasses.fields(recipe) if f.name not in ("rule", "epochs")]
    names += [f"rule.{f.name}" for f in dataclasses.fields(recipe.rule)]
    if not equals or kind not in ("log", "float", "int", "choice"):
        raise ValueError(f"{text!r} is no part of a search space: give {FORMS}")
    if name not in names:
        raise ValueError(
            f"a search cannot change {name!r}: it is no field of the recipe, nor, as rule.FIELD, "
            f"of its rule{did_you_mean(name, names)}"
        )
    if kind == "choice":
        found = Dimension(name, kind, choices=tuple(_value(part) for part in rest.split(",")))
    else:
        found = Dimension(name, kind, _bounds(text, rest, kind))
    for value in found.choices or found.bounds:
        with_values(recipe, {name: int(value) if kind == "int" else value})
    return found


def _bounds(text: str, rest: str, kind: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in rest.split(":"))
    except ValueError as error:
        raise ValueError(f"{text!r} is no part of a search space: give {FORMS}") from error
    if not low < high or (kind == "log" and low <= 0):
        least = "0 < low < high" if kind == "log" else "low < high"
        raise ValueError(f"need {least} in {text!r}")
    return low, high


def _value(text: str) -> Any:
    """A number, ``true``, ``false`` or ``null``, otherwise the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values of some fields.

    The schedule of the meta-learning rate keeps its shape: its final rate is scaled along with its
    first, unless it is given.

    Raises:
        ValueError: values that do not fit their fields, or each other.
    """
    rule = {k.removeprefix("rule."): v for k, v in values.items() if k.startswith("rule.")}
    own = {k: v for k, v in values.items() if not k.startswith("rule.")}
    if "meta_lr" in own and recipe.meta_lr_final is not None:
        own.setdefault("meta_lr_final", own["meta_lr"] * recipe.meta_lr_final / recipe.meta_lr)
    return dataclasses.replace(recipe, rule=dataclasses.replace(recipe.rule, **rule), **own)
