"""`rec-dist recipes`: what rec-dist ships to start from, one line each."""

from rec_dist.config.shipped import recipes
from rec_dist.runtime.messages import say


def list_recipes() -> None:
    """Prints the name of each recipe with its description."""
    found = recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        say(f"{recipe.name:<{width}}  {recipe.description}")
