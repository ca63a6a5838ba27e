"""Meta-training recipes, one file each, found by being there."""

from learned_optim.meta.recipes._recipe import (
    MIXTURE_NAMES,
    AnyRecipe,
    EvolutionRecipe,
    Recipe,
    check_names,
    import_rules,
    load_recipe,
    read_recipe,
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
    "read_recipe",
    "recipe_descriptions",
    "recipe_from_json",
    "recipes",
    "rule_config",
]
