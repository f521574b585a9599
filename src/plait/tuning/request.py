"""What a command line or a Python call asks for → the recipe that is tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.recipes.request import read_request
from plait.recipes.schema import Recipe
from plait.tasks.loading import with_tasks

START = "regmean"  # the method where none is named


def tune_request(
    source: Recipe | str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    tasks: Sequence[str | Path] | None,
    settings: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> tuple[Recipe, Path | None]:
    """Return the recipe, and the folder that its relative paths start from.

    Args:
        source: adapters, the path of a recipe, or a `Recipe`.
        tasks: files, from the working directory; the recipe's own when None.
        settings: keys of a recipe.
        sets: `PATH=VALUE` for others.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    if isinstance(source, Recipe):
        if settings or sets:
            raise RecipeError(f"a Recipe is complete; put {', '.join([*settings, *sets])} into it, or give adapters or a file.")
        recipe, folder = source, source.folder
    else:
        spec = [f"tune.{key}={value!r}" for key, value in dict(settings.get("tune") or {}).items()]
        others = {key: value for key, value in settings.items() if key != "tune" and value is not None}
        file, adapters = (Path(source), []) if isinstance(source, (str, Path)) else (None, source)
        recipe, folder = read_request(file, adapters, others, [*spec, *sets], method=START)
    if "method" not in recipe.model_fields_set:
        given = recipe.model_dump(by_alias=True, exclude_unset=True)
        recipe = recipe.changed(method=Recipe.model_validate({**given, "method": {"name": START}}).method)
    return with_tasks(recipe, tasks), folder
