"""Recipes: everything that determines a meta-training, as data. One file each."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from learned_optim._discovery import did_you_mean, import_submodules, unknown_name
from learned_optim._fields import check_fields
from learned_optim.rules import RuleConfig, build_rule, rule_class, rule_reference

#: The entry ``method`` in the JSON form of an :class:`EvolutionRecipe`.
METHOD = "evolution"

#: Mixtures of :mod:`learned_optim.meta.populations`: a recipe's task may be one of them.
MIXTURE_NAMES = ("populations-2", "populations-3")

_COUNTS = (
    "epochs", "meta_steps", "runs_per_epoch", "tasks_per_meta_step", "horizon", "truncation",
    "long_truncation", "unrolls_per_run", "coordinates", "pairs", "validation_horizon", "patience",
    "validation_tasks", "validation_every",
)  # fmt: skip
# Fields, the condition on their values, and its words.
_BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    # Standard deviations over the test runs go into the checkpoint's record.
    (("validation_runs", "test_runs"), lambda value: value >= 2, "at least 2"),
    (("meta_lr_final", "seed"), lambda value: value >= 0, "at least 0"),
    (("meta_lr", "clip_norm", "sigma"), lambda value: value > 0, "positive"),
    (("long_fraction", "large_share"), lambda value: 0 <= value <= 1, "in [0, 1]"),
    (("average",), lambda value: 0 <= value < 1, "in [0, 1)"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Fields of both methods, checks of all fields, and the JSON form."""

    task: str
    """Registered task family, whose meta-training split is used; of evolution strategies, also a
    mixture, `populations-2` or `populations-3`."""
    rule: RuleConfig
    """Configuration of the update rule; its type says which rule."""
    meta_lr: float
    """Learning rate of the meta-optimizer, Adam."""
    start: str | None = None
    """Checkpoint whose weights training begins with, of a rule of the same kind and size; untrained
    weights if not given."""
    seed: int = 0
    """Seed of everything random in the training."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.rule)
        for names, fits, what in _BOUNDS:
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} must be {what}, got {value}")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; :func:`recipe_from_json` reads it back."""
        data = dataclasses.asdict(self)
        return {**data, "rule": {"name": rule_reference(self.rule), "config": data["rule"]}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(_Recipe):
    """What to meta-train, on what, and how: by unrolls (:mod:`learned_optim.meta.unrolls`)."""

    epochs: int
    """Epochs of the training."""
    runs_per_epoch: int = 100
    """Optimizee runs per epoch (thesis section 4.1), one after another."""
    tasks_per_meta_step: int = 1
    """Optimizees side by side in every run; their meta-gradients are averaged."""
    horizon: int = 100
    """Inner steps of one optimizee run."""
    truncation: int = 20
    """Inner steps per unroll, and so per meta-step."""
    long_horizon: int | None = None
    """Inner steps of the longest runs."""
    long_fraction: float = 0.0
    """Share of runs whose length is log-uniform between ``horizon`` and ``long_horizon``."""
    long_truncation: int | None = None
    """Inner steps per unroll of the longer runs; ``truncation`` if not given."""
    unrolls_per_run: int | None = None
    """Longer runs learn from this many of their unrolls, drawn at random; from all if not given."""
    estimator: Literal["replay", "autograd", "full", "pes"] = "replay"
    """How meta-gradients are computed; all but `pes` backpropagate."""
    coordinates: int | None = None
    """Coordinates sampled per replay; all of them if not given."""
    sampling: Literal["uniform", "stratified"] = "uniform"
    """How coordinates are drawn: from all tensors together, or the same number from each."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights, of `pes`."""
    sigma: float = 0.01
    """Standard deviation of the perturbations."""
    meta_lr_final: float | None = None
    """Meta-learning rate after the last meta-step, by a cosine; constant if not given."""
    clip_norm: float | None = None
    """Largest norm of a meta-gradient; longer ones are scaled down."""
    relative_loss: bool = False
    """Divide every meta-gradient by its unroll's mean loss: tasks of all scales count alike."""
    average: float = 0.0
    """Decay of the moving average of the weights, which is validated and saved."""
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
    """Task family of the test runs, if another than ``task``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_fraction and (self.long_horizon or 0) < self.horizon:
            raise ValueError(
                f"long_fraction={self.long_fraction} needs a long_horizon of at least "
                f"horizon={self.horizon}, got {self.long_horizon}"
            )
        if self.estimator == "pes" and self.unrolls_per_run is not None:
            raise ValueError(
                f"estimator='pes' learns from every unroll of a run, because its particles go "
                f"through all of them: leave out unrolls_per_run={self.unrolls_per_run}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionRecipe(_Recipe):
    """What to meta-train, on what, and how: by evolution strategies on whole runs.

    See :mod:`learned_optim.meta.whole_runs`.
    """

    meta_steps: int
    """Meta-steps, over which the meta-learning rate falls by a cosine."""
    meta_lr_final: float
    """Meta-learning rate after the last meta-step."""
    horizon: int | None = None
    """Inner steps of the runs of a task family. Mixtures draw their own."""
    tasks_per_meta_step: int = 8
    """Tasks of every meta-step; their meta-gradients are averaged."""
    pairs: int = 4
    """Pairs of opposite perturbations of the weights per task, a run each."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    large_from: int = 1_000_000
    """Meta-steps before large tasks, whose widths and batches are from the upper part of their
    ranges: small networks teach the most per second, and users' are larger."""
    large_share: float = 1.0
    """Share of large tasks from then on."""
    validation_tasks: int = 64
    """Tasks, always the same, on which weights are compared with tuned AdamW."""
    validation_every: int = 50
    """Meta-steps from one validation to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.horizon is None) != (self.task in MIXTURE_NAMES):
            raise ValueError(
                f"task {self.task!r} needs a horizon, the inner steps of its runs: the mixtures "
                f"{' and '.join(MIXTURE_NAMES)} alone draw them"
                if self.horizon is None
                else f"horizon={self.horizon} does not apply to the mixture {self.task!r}, which "
                f"draws the lengths of runs for each task"
            )

    def to_json(self) -> dict[str, Any]:
        return {"method": METHOD, **super().to_json()}


AnyRecipe: TypeAlias = Recipe | EvolutionRecipe


# ---- recipes by name and in files


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
    """Raise ``ValueError`` for an unknown name; the message has the nearest known."""
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
    """A recipe from JSON data, the inverse of :meth:`Recipe.to_json`.

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
    """A recipe by its shipped name, from a TOML or JSON file, or from a run folder.

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
    if path.suffix not in (".json", ".toml") and path.name == source:
        raise unknown_name("recipe", source, list(known))
    return read_recipe(path)


def read_recipe(path: Path) -> AnyRecipe:
    """A recipe from a file; the errors are those of :func:`load_recipe`."""
    if path.suffix not in (".json", ".toml") or not path.is_file():
        raise FileNotFoundError(f"no recipe file or run folder at {path}")
    try:
        return recipe_from_json(_parsed(path))
    except ValueError as error:
        remedy = ""
        if path.name == "recipe.json":  # of a run folder
            remedy = (
                f". If it is damaged, delete it, and start the run again by the recipe that it "
                f"began with and --folder {path.parent}: nothing else of the run is lost"
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
