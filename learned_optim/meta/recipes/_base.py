"""Recipes: everything that determines a meta-training run, as data."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

from learned_optim._discovery import did_you_mean, import_submodules, unknown_name
from learned_optim._fields import check_fields
from learned_optim.meta.recipes._evolution import METHOD, EvolutionRecipe
from learned_optim.rules import RuleConfig, build_rule, rule_class, rule_reference

_AT_LEAST = {
    "epochs": 1,
    "runs_per_epoch": 1,
    "tasks_per_meta_step": 1,
    "horizon": 1,
    "truncation": 1,
    "long_truncation": 1,
    "unrolls_per_run": 1,
    "coordinates": 1,
    "pairs": 1,
    "validation_runs": 2,
    "validation_horizon": 1,
    "test_runs": 2,  # their standard deviation goes into the checkpoint's record
    "patience": 1,
    "meta_lr_final": 0,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to meta-train, on what, and how."""

    task: str
    """Registered task family; its meta-training split is used."""
    rule: RuleConfig
    """Configuration of the update rule; its type says which rule."""
    epochs: int
    """How many epochs to run."""
    meta_lr: float
    """Learning rate of the meta-optimizer, Adam."""
    start: str | None = None
    """Checkpoint whose weights training begins with, of a rule of the same kind and size; untrained
    weights if not given."""
    runs_per_epoch: int = 100
    """Optimizee runs per epoch (thesis section 4.1), one after another."""
    tasks_per_meta_step: int = 1
    """Optimizees side by side in every run; their meta-gradients are averaged."""
    horizon: int = 100
    """Inner steps of one optimizee run."""
    truncation: int = 20
    """Inner steps per unroll, and so per meta-step."""
    long_horizon: int | None = None
    """Where the heavy tail of run lengths ends; all runs are of ``horizon`` if not given."""
    long_fraction: float = 0.0
    """Share of runs whose length is log-uniform between ``horizon`` and ``long_horizon``."""
    long_truncation: int | None = None
    """Inner steps per unroll of the longer runs; ``truncation`` if not given."""
    unrolls_per_run: int | None = None
    """Longer runs learn from this many of their unrolls, drawn at random; from all if not given."""
    estimator: Literal["replay", "autograd", "full", "es", "pes"] = "replay"
    """How meta-gradients are computed: by backpropagation, or by evolution strategies."""
    coordinates: int | None = None
    """Coordinates sampled per replay; all of them if not given."""
    sampling: Literal["uniform", "stratified"] = "uniform"
    """How they are drawn: from all alike, or as many from every tensor."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights, of `es` and `pes`."""
    sigma: float = 0.01
    """Standard deviation of the perturbations."""
    meta_lr_final: float | None = None
    """Where a cosine takes the meta-learning rate by the last meta-step; constant if not given."""
    clip_norm: float | None = None
    """Largest norm of a meta-gradient; longer ones are scaled down."""
    relative_loss: bool = False
    """Divide every meta-gradient by its unroll's mean loss: tasks of all scales count alike."""
    average: float = 0.0
    """Decay of the moving average of weights that is validated and kept; 0 keeps the last."""
    validation_runs: int = 20
    """Fresh optimizee runs, the same after every epoch, that choose the best epoch."""
    validation_horizon: int | None = None
    """Inner steps of validation and test runs; ``horizon`` if not given."""
    validation_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """Mean over runs of the summed loss; the geometric one suits tasks of different scales."""
    test_runs: int = 100
    """Fresh optimizee runs of the evaluation split for the figures in the checkpoint."""
    patience: int | None = None
    """Stop after this many epochs without a better validation."""
    test_task: str | None = None
    """Task family of the test runs, if another than ``task``: what is learned carries over to."""
    seed: int = 0
    """Seed of everything random in the run."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.long_fraction <= 1:
            raise ValueError(f"long_fraction must lie in [0, 1], got {self.long_fraction}")
        if self.long_fraction and (self.long_horizon or 0) < self.horizon:
            raise ValueError(
                f"long_fraction={self.long_fraction} needs a long_horizon of at least "
                f"horizon={self.horizon}, got {self.long_horizon}"
            )
        for name in ("meta_lr", "clip_norm", "sigma"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must lie in [0, 1), got {self.average}")
        if self.estimator == "pes" and self.unrolls_per_run is not None:
            raise ValueError(
                f"estimator='pes' learns from every unroll of a run, because its particles go "
                f"through all of them: leave out unrolls_per_run={self.unrolls_per_run}"
            )

    @property
    def perturbs(self) -> bool:
        """Whether the estimator compares runs of perturbed weights: ranks then share the pairs."""
        return self.estimator in ("es", "pes")

    @property
    def longest_run(self) -> int:
        """Inner steps of the longest runs."""
        return max(self.horizon, self.long_horizon or 0) if self.long_fraction else self.horizon

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        data = dataclasses.asdict(self)
        data["rule"] = {"name": rule_reference(self.rule), "config": data["rule"]}
        return data


#: A recipe of either method: meta-gradients by backpropagation, or evolution strategies.
AnyRecipe: TypeAlias = Recipe | EvolutionRecipe

_R = TypeVar("_R", Recipe, EvolutionRecipe)


def rule_config(name: str, values: dict[str, Any] | None = None) -> RuleConfig:
    """The configuration of an update rule from its name and plain data.

    Args:
        name: a registered name, or ``"module:name"`` for a rule that an importable module defines.
        values: fields that differ from their defaults.

    Raises:
        ValueError: no such module or rule, or unknown or unfit fields; the message names the
            nearest that exists.
    """
    module, _, own = name.rpartition(":")
    if module:
        import_rules(module)
    values = values or {}
    if not isinstance(values, dict):
        raise ValueError(f"the config of a rule must be a table, got {values!r}")
    known = [field.name for field in dataclasses.fields(rule_class(own).Config)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"{key!r} does not fit update rule {own!r}, whose fields are "
                f"{', '.join(known) or 'none'}{did_you_mean(key, known)}"
            )
    config: RuleConfig = build_rule(own, values).config
    return config


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
        ValueError: unknown or missing fields, or values that do not fit them; of an unknown field,
            the message names the nearest that exists.
    """
    if not isinstance(data, dict):
        raise ValueError(f"not a recipe: a table of fields is one, got {str(data)[:40]}")
    method = data.get("method")
    if method is None:
        return _from_json(Recipe, data)
    if method != METHOD:
        raise ValueError(f"not a recipe: unknown method {method!r}; known: {METHOD}")
    values = {key: value for key, value in data.items() if key != "method"}
    return _from_json(EvolutionRecipe, values)


def _from_json(kind: type[_R], data: dict[str, Any]) -> _R:
    known = dataclasses.fields(kind)
    names = [field.name for field in known]
    for key in data:
        if key not in names:
            near = did_you_mean(key, names) or f". Fields: {', '.join(names)}"
            raise ValueError(f"not a recipe: unknown field {key!r}{near}")
    missing = [f.name for f in known if f.name not in data and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"not a recipe: it lacks {', '.join(missing)}")
    try:
        rule = data["rule"]
        if isinstance(rule, str):
            rule = {"name": rule}
        for key in rule:
            if key not in ("name", "config"):
                raise ValueError(
                    f"unknown field {key!r} of rule, which has name and config"
                    f"{did_you_mean(key, ('name', 'config'))}"
                )
        config = rule_config(rule["name"], rule.get("config"))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"not a recipe: rule: {error}") from error
    values = {**data, "rule": config}
    return kind(**values)


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
