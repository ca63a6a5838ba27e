"""Meta-training recipes, one file each, found by being there."""

from learned_optim.meta.recipes._base import (
    AnyRecipe,
    Recipe,
    import_rules,
    load_recipe,
    recipe_descriptions,
    recipe_from_json,
    recipes,
    rule_config,
)
from learned_optim.meta.recipes._evolution import (
    EvolutionRecipe,
)
from learned_optim.meta.recipes._schema import recipe_schema

__all__ = [
    "AnyRecipe",
    "EvolutionRecipe",
    "Recipe",
    "import_rules",
    "load_recipe",
    "recipe_descriptions",
    "recipe_from_json",
    "recipe_schema",
    "recipes",
    "rule_config",
]
