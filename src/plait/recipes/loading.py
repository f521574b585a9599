"""A recipe's file → `Recipe`, whatever form it is written in, with everything that is wrong reported at once.

Independent of adapters: whether a path leads anywhere is found when it is followed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from plait.errors import AddressError, RecipeError
from plait.folders import absolute, expanded, working_folder
from plait.notices import frames_within
from plait.parsing import read_text, shown, text_problem
from plait.recipes.documents import YamlDocument, open_document, read_document
from plait.recipes.file_kinds import refuse_other_kind
from plait.recipes.importers.entries import named_entry
from plait.recipes.importers.forms import RECIPE_FORMS, convert, recipe_form
from plait.recipes.overrides import Overrides, set_values
from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Origins, Problem, show_value
from plait.recipes.schema import Recipe
from plait.recipes.validation import check_recipe
from plait.recipes.writing import to_yaml


class LoadedRecipe(NamedTuple):
    """A recipe, and where its relative paths start.

    Attributes:
        recipe: as the file says, with overrides.
        folder: the file's own folder.
    """

    recipe: Recipe
    folder: Path


def load_recipe(path_or_text: str | Path, *, overrides: Overrides = ()) -> Recipe:
    """Return the recipe that a file or a text describes; that of a file knows its folder.

    >>> recipe = plait.load_recipe("recipe.yaml", overrides={"scale": 0.5})
    >>> plait.plan(recipe).rank

    Args:
        path_or_text: a file, or the text of a recipe, in today's form or any other that plait reads (`plait recipe migrate`).
        overrides: path → value, such as `method.density`, set on top of what is read.

    Returns:
        The recipe, with every default.

    Raises:
        RecipeError: the file cannot be read, or the recipe is not valid; all that is wrong is listed with its line.
    """
    loaded, notes = _read(path_or_text, overrides)
    _warn(notes)
    return loaded.recipe if _is_text(path_or_text) else loaded.recipe.placed(loaded.folder)


def read_recipe(path_or_text: str | Path, *, overrides: Overrides = ()) -> LoadedRecipe:
    """Return the recipe that a file or a text describes, and the folder that its relative paths start from.

    Reads YAML and JSON in the present form and in every form of `RECIPE_FORMS`: those of the older framework (each with a
    `DeprecationWarning`), mergekit's (with a `RecipeWarning` wherever numbers will differ).

    Args:
        path_or_text: a file, or the text of a recipe; a text has several lines or `key: value`. A text's folder is the
            working directory.
        overrides: path → value, or such pairs (`parse_override`), set on top of what is read.

    Raises:
        RecipeError: the file cannot be read, or the recipe is not valid; all that is wrong is listed with its line.
    """
    loaded, notes = _read(path_or_text, overrides)
    _warn(notes)
    return loaded


def build_recipe(data: Mapping[str, Plain], *, source: str = "recipe") -> Recipe:
    """Return the recipe that plain data describes, checked as a file is, without lines.

    Args:
        data: mappings, lists and scalars, from flags or from Python.
        source: what messages call it.

    Raises:
        RecipeError: it is not valid; all that is wrong is listed.
    """
    recipe, notes = _resolve(YamlDocument(plain_data(data), {}), source, None, ())
    _warn(notes)
    return recipe.written(Origins(""))


def migrate_file(file: str | Path) -> tuple[str, list[str]]:
    """Return a recipe's text in the present form, and what changed; a recipe in that form keeps its text as it is.

    Args:
        file: a recipe in any form that `read_recipe` takes.

    Raises:
        RecipeError: it cannot be read, a part of it has no counterpart, or it is not valid.
    """
    path = expanded(file)
    folder, document = absolute(path).parent, open_document(path)
    _, notes = _resolve(document, str(file), folder, ())
    if not notes:
        forms = () if "version" in document.data else RECIPE_FORMS
        return read_text(path, RecipeError), list(filter(None, (form.present_note(document.data) for form in forms)))
    converted = convert(document.data, folder)
    Origins(str(file), document.lines, converted.moved).refuse(converted.missing)
    return to_yaml(converted.data), [str(note) for note in notes]


def _warn(notes: list[Warning]) -> None:
    """Warn in the line outside of plait that asked for the recipe, through whatever function it did."""
    for note in notes:
        warnings.warn(note, stacklevel=frames_within())


def _read(path_or_text: str | Path, overrides: Overrides) -> tuple[LoadedRecipe, list[Warning]]:
    if _is_text(path_or_text):
        document, source, folder = read_document(str(path_or_text), "recipe"), "recipe", working_folder()
    else:
        path = expanded(path_or_text)
        folder, document, source = absolute(path).parent, open_document(path), str(path_or_text)
    recipe, notes = _resolve(document, source, folder, overrides)
    return LoadedRecipe(recipe, folder), notes


def _is_text(source: str | Path) -> bool:
    return isinstance(source, str) and ("\n" in source or ": " in source or source.lstrip().startswith("{"))


def _resolve(document: YamlDocument, source: str, folder: Path | None, overrides: Overrides) -> tuple[Recipe, list[Warning]]:
    data = document.data
    if data is None or data == {}:
        raise RecipeError(f"{source}: there is nothing in it. A recipe needs at least 'adapters'.")
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source}: a recipe is a mapping (key: value), not {show_value(data)}.")
    refuse_other_kind(data, "a recipe", source)
    converted = convert(data, folder)
    origins = Origins(source, document.lines, converted.moved)
    if not converted.data:
        origins.refuse([*document.problems, *converted.problems])
    values, overridden, dead_ends = set_values(converted.data, overrides)
    values, bad_paths = _name_adapters(plain_data(values), folder)
    recipe, problems = check_recipe(values)
    known = [*document.problems, *converted.problems, *dead_ends, *bad_paths]
    origins = Origins(source, document.lines, converted.moved, tuple(overridden))
    reported = {p.path[:2] for p in known if p.path[:1] == ("adapters",)}  # adapters whose path is known to be wrong
    origins.refuse([*known, *(p for p in problems if len(p.path) != 2 or p.path not in reported)])
    if recipe is None:
        raise AssertionError("a recipe without problems was not built")
    form = recipe_form(data)
    return recipe.written(origins), [] if form is None else [form.warning(note) for note in converted.notes]


def _name_adapters(data: dict[str, Plain], folder: Path | None) -> tuple[dict[str, Plain], list[Problem]]:
    """Write out names and paths of the adapters, so that the recipe means the same in any working directory."""
    adapters = data.get("adapters")
    if not isinstance(adapters, list):
        return data, []
    problems: list[Problem] = []
    entries: list[Plain] = []
    for i, entry in enumerate(adapters):
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        place: KeyPath = ("adapters", i, "path") if isinstance(entry, Mapping) else ("adapters", i)
        try:
            entries.append(named_entry(entry, folder) if isinstance(path, str) and path else entry)
        except AddressError as error:
            entries.append(entry)
            problems.append(Problem(place, str(error)))
        if isinstance(entries[i], Mapping):  # the name is never what is missing
            entries[i] = {"name": f"adapter-{i}", **entries[i]}
    return {**data, "adapters": entries}, problems


def plain_data(value: Plain, where: str = "recipe") -> Plain:
    """Return a copy as a file would give it: keys as text, lists for tuples, texts for paths.

    Raises:
        RecipeError: a text could not be read again from a file; `where` it is.
    """
    if isinstance(value, Mapping):
        return {str(plain_data(str(key), where)): plain_data(inner, where) for key, inner in value.items()}
    if isinstance(value, str) and (words := text_problem(value)):
        raise RecipeError(f"{where}: {shown(value)} is {words}, which no file can hold.")
    if isinstance(value, (list, tuple)):
        return [plain_data(inner, where) for inner in value]
    return str(value) if isinstance(value, Path) else value
