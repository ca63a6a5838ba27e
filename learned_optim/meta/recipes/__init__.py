"""Meta-training recipes, one file each, found by being there."""

from learned_optim.meta.recipes._base import Recipe, load_recipe, recipe_from_json, recipes

__all__ = ["Recipe", "load_recipe", "recipe_from_json", "recipes"]
