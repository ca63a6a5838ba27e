"""Meta-training recipes, one file each, found by being there."""

from learned_optim.meta.recipes._base import (
    MIXTURE_NAMES,
    AnyRecipe,
    EvolutionRecipe,
    Recipe,
)
from learned_optim.meta.recipes._files import (
    check_names,
    import_rules,
    load_recipe,
    recipe_descriptions,
    recipe_from_json,
    recipes,
    rule_config,
)

__all__ = [
    "MIXTURE_NAMES",
    "AnyRecipe",
    "EvolutionRecipe",
    "Recipe",
    "check_names",
    "import_rules",
    "load_recipe",
    "recipe_descriptions",
    "recipe_from_json",
    "recipes",
    "rule_config",
]
