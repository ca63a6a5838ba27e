"""Meta-training recipes, one file each, found by being there."""

from learned_optim.meta.recipes._base import (
    COMMON,
    GROUPS,
    Recipe,
    import_rules,
    load_recipe,
    recipe_descriptions,
    recipe_from_json,
    recipes,
    rule_config,
)

__all__ = [
    "COMMON",
    "GROUPS",
    "Recipe",
    "import_rules",
    "load_recipe",
    "recipe_descriptions",
    "recipe_from_json",
    "recipes",
    "rule_config",
]
