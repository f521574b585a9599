"""What adapters a command is about, and how they are merged: as text or in Python, one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.merging.moments import MomentsOf
from plait.recipes.request import Adapters, base_from_here, is_recipe_file, read_request
from plait.recipes.schema import Recipe
from plait.results.progress import Progress

RecipeSource = Recipe | str | Path | Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True)
class Request:
    """A recipe that is asked for.

    Attributes:
        source: adapters (references, or name → reference), the path of a recipe, both (the recipe comes first), or a `Recipe`.
        settings: as `read_request` takes them; those that are None are not given.
        sets: `PATH=VALUE`, applied last.
        moments: second moments of inputs: files, which become part of the recipe, or a function, which no recipe can hold.
        base: the base model, in place of the recipe's or the adapters' own.
        tasks: files of the tasks, relative to the working directory; the recipe's own when None.
    """

    source: RecipeSource
    settings: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None
    base: str | Path | None = None
    tasks: Sequence[str | Path] | None = None

    @cached_property
    def given(self) -> dict[str, Any]:
        """The settings that are given, with files of moments and the base among them."""
        others = {"moments": None if callable(self.moments) else self.moments, "base_model": self.base}
        given = {key: value for key, value in self.settings.items() if value is not None}
        return given | {key: value if key == "moments" else str(value) for key, value in others.items() if value is not None}

    @property
    def function(self) -> MomentsOf | None:
        """The function that gives second moments."""
        return self.moments if callable(self.moments) else None

    @property
    def parts(self) -> tuple[Path | None, Adapters]:
        """The recipe's file and the adapters.

        Raises:
            RecipeError: the source is neither.
        """
        if isinstance(self.source, Recipe):
            raise RecipeError("a Recipe is complete; give adapters or a recipe file instead.")
        if isinstance(self.source, (str, Path)):
            return Path(self.source), []
        if isinstance(self.source, Mapping):
            return None, self.source
        first = self.source[0] if self.source else ""
        return (Path(first), self.source[1:]) if is_recipe_file(first) else (None, self.source)

    @cached_property
    def resolved(self) -> tuple[Recipe, Path | None]:
        """The recipe, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        if not isinstance(self.source, Recipe):
            recipe, folder = read_request(*self.parts, self.given, self.sets)
            return self.with_tasks(recipe), folder
        changes = [key for key in [*self.given, *self.sets] if key != "base_model" or self.base is None]
        if changes:
            raise RecipeError(
                f"a Recipe is complete; put {', '.join(changes)} into it, or give adapters or a recipe file instead."
            )
        recipe, folder = self.source, self.source.folder
        if self.base is not None:
            recipe = recipe.changed(base_model=base_from_here(str(self.base)) if folder else str(self.base))
        return self.with_tasks(recipe), folder

    def with_tasks(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the tasks that are asked for."""
        if self.tasks is None:
            return recipe
        from plait.tasks.loading import with_tasks

        return with_tasks(recipe, self.tasks)


def complete_from_texts(
    recipe: Recipe,
    folder: Path | None,
    *,
    out: Path | None,
    moments: MomentsOf | None,
    force: bool,
    workers: int | None,
    progress: Progress | None,
) -> tuple[Recipe, tuple[str, ...]]:
    """Take what a recipe leaves to its tasks' texts: moments, and values that are `auto`; return it, and notes."""
    if not recipe.values_to_find and (moments is not None or not recipe.lacks_moments):
        return recipe, ()  # and no package for live models is needed
    from plait.calibration.completion import complete_recipe

    done = complete_recipe(recipe, folder=folder, out=out, moments=moments, force=force, workers=workers, progress=progress)
    return done.recipe, done.notes


def recipe_or_adapters(source: RecipeSource) -> RecipeSource:
    """Return a source that is not both a recipe's file and adapters; a list that holds a recipe alone is its path.

    Raises:
        RecipeError: it is both.
    """
    if isinstance(source, (Recipe, str, Path)):
        return source
    file, adapters = Request(source).parts
    if file is not None and adapters:
        raise RecipeError(f"a recipe names its adapters; got {file} and {', '.join(map(str, adapters))}.")
    return source if file is None else file


def rank_or_energy(rank: int | str | None, energy: float | None) -> int | str:
    """Return a rank as a recipe spells it.

    Raises:
        RecipeError: both or neither are given, or the energy is not a share.
    """
    if rank is not None and energy is None:
        return rank
    if rank is not None or energy is None:
        raise RecipeError("give either --rank (rank=) or --energy (energy=), such as a rank of 16 or an energy of 0.99.")
    if not 0 < energy <= 1:
        raise RecipeError(f"--energy (energy=) must be a share in (0, 1], such as 0.99; got {energy:g}.")
    return f"energy:{energy!r}"
