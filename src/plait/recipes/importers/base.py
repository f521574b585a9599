"""What a form of recipe other than plait's own is: how it is recognized, converted, and what its user is warned of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from plait.notices import PlaitWarning
from plait.recipes.paths import Plain
from plait.recipes.problems import ConvertedRecipe


class RecipeWarning(PlaitWarning):
    """Something about a recipe of another tool that its user should know: where numbers will differ."""


@dataclass(frozen=True)
class RecipeForm:
    """One form that recipes are read in.

    Attributes:
        matches: whether plain data is a recipe of this form.
        convert: the data and the folder where relative paths start (the working directory when None) → the present form.
        warning: what each of the conversion's notes is warned as.
        present_note: what to say of a recipe in the present form that may come from this one; None for nothing.
    """

    matches: Callable[[Mapping[str, Plain]], bool]
    convert: Callable[[Mapping[str, Plain], Path | None], ConvertedRecipe]
    warning: type[Warning] = RecipeWarning
    present_note: Callable[[Mapping[str, Plain]], str | None] = lambda data: None
