"""The positional arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.recipes.schema import Recipe

_RECIPES = (".yaml", ".yml", ".json")


def recipe_file(inputs: list[str]) -> Path | None:
    """Return the recipe among a command's arguments; it comes first."""
    return Path(inputs[0]) if inputs[0].lower().endswith(_RECIPES) else None


def adapters_of(inputs: list[str]) -> list[str]:
    """Return the adapters among a command's arguments."""
    return inputs[1:] if inputs[0].lower().endswith(_RECIPES) else inputs


def with_tasks(recipe: Recipe, tasks: list[str] | None) -> Recipe:
    """Return a recipe with the tasks of `--tasks`, where there are some."""
    from plait.tasks.loading import placed

    names = [part for text in tasks or [] for part in text.split(",") if part]
    return recipe.model_copy(update={"tasks": tuple(placed(name) for name in names)}) if names else recipe


def completed(
    recipe: Recipe, folder: Path | None, out: Path | None, *, force: bool, workers: int | None
) -> tuple[Recipe, tuple[str, ...]]:
    """Take what a recipe leaves to its tasks' texts; return it, and notes."""
    if recipe.scale != "auto" and not recipe.lacks_moments:
        return recipe, ()  # and no package for live models is needed
    from plait.calibration.completion import complete
    from plait.cli.console import ProgressBars, warnings_as_notes

    with warnings_as_notes():
        done = complete(recipe, folder=folder, out=out, force=force, workers=workers, progress=ProgressBars())
    return done.recipe, done.notes
