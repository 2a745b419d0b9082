"""`rec-dist recipes`: what rec-dist ships to start from, one line each."""

from rec_dist.config.shipped import recipes


def list_recipes() -> None:
    """Prints the name of each recipe with its description."""
    found = recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:<{width}}  {recipe.description}")
