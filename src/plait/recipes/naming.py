"""The file of a recipe, named in whatever a command refuses of the recipe, however late that shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from plait.recipes.schema import Recipe

P = ParamSpec("P")
R = TypeVar("R")


def naming_its_file(function: Callable[Concatenate[Recipe, P], R]) -> Callable[Concatenate[Recipe, P], R]:
    """Name the file of a function's recipe in its RecipeError or PlanError, where nothing further in has named it."""

    @wraps(function)
    def named(recipe: Recipe, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with recipe.origins.named():
            return function(recipe, *args, **kwargs)

    return named
