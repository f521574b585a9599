"""The forms of recipes that are read besides plait's own. A new one is a `RecipeForm` in this package, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from plait.recipes.importers.base import RecipeForm
from plait.recipes.importers.mergekit import MERGEKIT
from plait.recipes.importers.migration import OLDER
from plait.recipes.paths import Plain
from plait.recipes.problems import ConvertedRecipe

RECIPE_FORMS: tuple[RecipeForm, ...] = (MERGEKIT, OLDER)  # the first that matches is taken


def recipe_form(data: Mapping[str, Plain]) -> RecipeForm | None:
    """Return the form of a recipe; None for plait's own."""
    return next((form for form in RECIPE_FORMS if form.matches(data)), None)


def convert(data: Mapping[str, Plain], folder: Path | None) -> ConvertedRecipe:
    """Return a recipe of any form in plait's own; one in plait's own as it is."""
    form = recipe_form(data)
    return ConvertedRecipe(dict(data)) if form is None else form.convert(data, folder)
