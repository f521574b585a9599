"""What adapters a command is about, and how they are merged: as text or in Python, one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.hub.pretrained import LoadOptions
from plait.merging.moments import MomentsOf
from plait.recipes.request import Adapters, base_from_here, check_one_base, is_recipe_file, read_request
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
        method: where neither settings nor the recipe name one.
        mixed: whether adapters may come after a recipe's file, in place of its own.
    """

    source: RecipeSource
    settings: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None
    base: str | Path | None = None
    tasks: Sequence[str | Path] | None = None
    method: str = "linear"
    mixed: bool = True

    @property
    def saved(self) -> str | None:
        """The reference of one adapter or model that is taken as it is, for commands that take one; None for a merge."""
        return str(self.source) if isinstance(self.source, (str, Path)) and not is_recipe_file(self.source) else None

    def on(self, base: str | Path | None) -> Request:
        """Return the request of a merge in memory, with the base that it is put on, for DoRA and adapters of several names."""
        return replace(self, base=base)

    @cached_property
    def given(self) -> dict[str, Any]:
        """The settings that are given, with files of moments and the base among them.

        Raises:
            RecipeError: the base is given twice.
        """
        check_one_base(self.base, self.settings)
        others = {"moments": None if callable(self.moments) else self.moments, "base_model": self.base}
        given = {key: value for key, value in self.settings.items() if value is not None}
        return given | {key: value if key == "moments" else str(value) for key, value in others.items() if value is not None}

    @property
    def chooses_no_method(self) -> bool:
        """Whether several adapters are given by themselves, and nothing about how they are merged."""
        if isinstance(self.source, (Recipe, str, Path)) or self.parts[0] is not None or len(self.source) < 2:
            return False
        return not {"method", "weights"} & {*self.given} and not any(
            text.startswith(("method", "weights")) for text in self.sets
        )

    @property
    def function(self) -> MomentsOf | None:
        """The function that gives second moments."""
        return self.moments if callable(self.moments) else None

    @property
    def parts(self) -> tuple[Path | None, Adapters]:
        """The recipe's file and the adapters.

        Raises:
            RecipeError: the source is neither; or both, where that may not be.
        """
        if isinstance(self.source, Recipe):
            raise RecipeError("a Recipe is complete; give adapters or a recipe file instead.")
        if isinstance(self.source, (str, Path)):
            return Path(self.source), []
        if isinstance(self.source, Mapping):
            return None, self.source
        first = self.source[0] if self.source else ""
        if not is_recipe_file(first):
            return None, self.source
        if self.source[1:] and not self.mixed:
            raise RecipeError(f"a recipe names its adapters; got {first} and {', '.join(map(str, self.source[1:]))}.")
        return Path(first), self.source[1:]

    @cached_property
    def resolved(self) -> tuple[Recipe, Path | None]:
        """The recipe, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        if not isinstance(self.source, Recipe):
            recipe, folder = read_request(*self.parts, self.given, self.sets, method=self.method)
            return self._finished(recipe), folder
        changes = [key for key in [*self.given, *self.sets] if key != "base_model" or self.base is None]
        if changes:
            raise RecipeError(
                f"a Recipe is complete; put {', '.join(changes)} into it, or give adapters or a recipe file instead."
            )
        recipe, folder = self.source, self.source.folder
        if self.base is not None:
            recipe = recipe.changed(base_model=base_from_here(str(self.base)) if folder else str(self.base))
        return self._finished(recipe), folder

    def _finished(self, recipe: Recipe) -> Recipe:
        if self.method != "linear" and "method" not in recipe.model_fields_set:
            given = recipe.model_dump(by_alias=True, exclude_unset=True)
            recipe = recipe.changed(method=Recipe.model_validate({**given, "method": {"name": self.method}}).method)
        return self.with_tasks(recipe)

    def with_tasks(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the tasks that are asked for."""
        if self.tasks is None:
            return recipe
        from plait.tasks.loading import with_tasks

        return with_tasks(recipe, self.tasks)


def complete_from_texts(recipe: Recipe, load: LoadOptions | None, **writing: Any) -> tuple[Recipe, tuple[str, ...]]:
    """Take what a recipe leaves to its tasks' texts: moments, and values that are `auto`; return it, and notes.

    Args:
        recipe: as asked for.
        load: how the base is loaded.
        **writing: other arguments of `calibration.completion.complete_recipe`.

    Raises:
        PlaitError: it cannot be taken; or `load` is given, and nothing is to be read.
    """
    if not _reads_texts(recipe, writing.get("moments")):
        return recipe, needless_loading(recipe, load, writing.get("moments"))  # and no package for live models is needed
    from plait.calibration.completion import complete_recipe

    done = complete_recipe(recipe, options=load or LoadOptions(), **writing)
    return done.recipe, done.notes


def check_texts(recipe: Recipe, load: LoadOptions | None, folder: Path | None, moments: MomentsOf | None) -> None:
    """Refuse what `complete_from_texts` refuses, as far as that shows without loading a model.

    Raises:
        PlaitError: what the recipe lacks cannot be taken.
    """
    if _reads_texts(recipe, moments):
        from plait.calibration.completion import read_for_completion

        read_for_completion(recipe, folder, load or LoadOptions())


def needless_loading(recipe: Recipe, load: LoadOptions | None, moments: MomentsOf | None) -> tuple[str, ...]:
    """Return notes on how a base is to be loaded that nothing is read with.

    Raises:
        RecipeError: dtype or place are given for a model that is not loaded.
    """
    if load is None or _reads_texts(recipe, moments):
        return ()
    if replace(load, trust_remote_code=False) != LoadOptions():
        raise RecipeError(
            "--load-dtype and --device-map (load_dtype=, device_map=) are for a merge that reads its tasks' texts: a "
            "method that needs second moments, or a value of 'auto', and --tasks. This one loads no model; leave them out."
        )
    # Scripts around PEFT give it to every merge, so that it is noted, and not refused.
    trusted = ("--trust-remote-code changes nothing here: this merge reads files and runs no code of a model.",)
    return trusted if load.trust_remote_code else ()


def _reads_texts(recipe: Recipe, moments: MomentsOf | None) -> bool:
    return bool(recipe.values_to_find) or (moments is None and recipe.lacks_moments)


@dataclass(frozen=True, kw_only=True)
class WritingOrder:
    """An order of a command that writes what a request asks for.

    Attributes:
        request: adapters, and how they are merged.
        out: where to write; None where the command has a place of its own, or for a plan.
        force: replace what is there.
        workers: modules worked on at a time.
    """

    request: Request
    out: Path | None = None
    force: bool = False
    workers: int | None = None

    @property
    def writing(self) -> dict[str, Any]:
        """The arguments of a function that plans, or merges and writes."""
        return {"out": self.out, "force": self.force, "workers": self.workers, "moments": self.request.function}

    def complete_from_texts(
        self, recipe: Recipe, folder: Path | None, progress: Progress | None, load: LoadOptions | None
    ) -> tuple[Recipe, tuple[str, ...]]:
        """Take what a recipe leaves to its tasks' texts; see `complete_from_texts` of this module."""
        completed, notes = complete_from_texts(recipe, load, folder=folder, progress=progress, **self.writing)
        if self.request.tasks and not _reads_texts(recipe, self.request.function):
            notes = (
                *notes,
                f"--tasks (tasks=) changes nothing here: method {recipe.method_name!r} lacks no second moments, and no value "
                "is 'auto'.",
            )
        return completed, notes


@dataclass(frozen=True)
class LowRankOrder:
    """An order of a command that writes an adapter at a rank, or at the lowest rank that keeps a share of energy.

    Attributes:
        out: where to write.
        rank: a number, or `energy:SHARE`.
        energy: that share.
        settings: the others.
        force: replace what is there.
        workers: worked on at a time.
    """

    out: Path
    rank: int | str | None = None
    energy: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    workers: int | None = None

    @property
    def wanted_rank(self) -> int | str:
        """The rank as a recipe spells it.

        Raises:
            RecipeError: both or neither are given, or the energy is not a share.
        """
        if self.rank is not None and self.energy is None:
            return self.rank
        if self.rank is not None or self.energy is None:
            raise RecipeError("give either --rank (rank=) or --energy (energy=), such as a rank of 16 or an energy of 0.99.")
        if not 0 < self.energy <= 1:
            raise RecipeError(f"--energy (energy=) must be a share in (0, 1], such as 0.99; got {self.energy:g}.")
        return f"energy:{self.energy!r}"
