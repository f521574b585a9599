"""Values set by path, on top of a recipe: `method.density=0.3`.

Independent of what a recipe may hold: a wrong path is found when the result is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from plait.errors import AddressError, RecipeError, did_you_mean
from plait.hub.references import parse_reference
from plait.recipes.documents import read_document
from plait.recipes.paths import KeyPath, Plain, get_item, read_path, show_path, split_assignment
from plait.recipes.problems import Origins, Problem, show_value

Overrides: TypeAlias = Mapping[str, Plain] | Sequence[tuple[str, Plain]]
#: What a text represents where a mapping is wanted: `method: ties`, `transforms: [identity]`, `adapters: [./code]`.
_SHORT_FOR = {"method": "name", "transforms": "name", "adapters": "path"}


def parse_override(text: str) -> tuple[str, Plain]:
    """Read `PATH=VALUE`; the value is YAML, so that `0.3`, `true`, `[a, b]` and `{a: 1}` mean what they do in a recipe.

    Returns:
        The path and the value, as `apply_overrides` takes them.

    Raises:
        RecipeError: there is no `=`, the path is not valid, or the value is not YAML.
    """
    keys, value = split_assignment(text)
    if value is None:
        raise RecipeError(f"{text!r} sets nothing: write PATH=VALUE, such as method.density=0.3.")
    try:
        document = read_document(value, text)
    except RecipeError as error:
        raise RecipeError(f"{error} Put a value with special characters in quotes.") from None
    Origins(text).refuse(document.problems)
    return show_path(keys), document.data


def apply_overrides(data: Mapping[str, Plain], overrides: Overrides) -> dict[str, Plain]:
    """Return a copy of `data` with values set by path; mappings on the way are made when they are missing.

    An item of a list is meant by its index or by its name (`adapters.intent.weight`). A text in the way is taken for
    what it is short for: `method.density` turns `method: ties` into a mapping. Whether a path makes sense is not
    checked here.

    Args:
        data: a recipe as plain data.
        overrides: path → value, or such pairs, applied in order.

    Raises:
        RecipeError: a path leads through what is neither a mapping nor a list, or to an item that is not there.
    """
    result, _, problems = set_values(data, overrides)
    Origins("the overrides").refuse(problems)
    return result


def set_values(data: Mapping[str, Plain], overrides: Overrides) -> tuple[dict[str, Plain], list[KeyPath], list[Problem]]:
    """Do what `apply_overrides` does; return the result, the paths that were set, and what could not be done."""
    result = copy.deepcopy(dict(data))
    paths: list[KeyPath] = []
    problems: list[Problem] = []
    for text, value in overrides.items() if isinstance(overrides, Mapping) else overrides:
        keys = read_path(text)
        try:
            paths.append(_set(result, keys, copy.deepcopy(value)))
        except _PathError as end:
            paths.append(keys)
            problems.append(Problem(keys, str(end)))
    return result, paths, problems


class _PathError(Exception):
    """A path cannot be followed."""


def _set(data: dict[str, Plain], keys: tuple[str, ...], value: Plain) -> KeyPath:
    """Set one value and return its path with indices as numbers."""
    place: Plain = data
    path: KeyPath = ()
    for i, key in enumerate(keys):
        step = _index(place, key, path) if isinstance(place, list) else key
        if i == len(keys) - 1:
            place[step] = value
            return (*path, step)
        path = (*path, step)
        place[step] = _opened(get_item(place, step), path)
        place = place[step]
    return path


def _opened(value: Plain, path: KeyPath) -> Plain:
    """Return what is at a path as something that can be stepped into."""
    if value is None:
        return {}
    if isinstance(value, (dict, list)):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    field = _SHORT_FOR.get(str(path[0])) if len(path) == (1 if path[0] == "method" else 2) else None
    if isinstance(value, str) and field:
        return {field: value}
    raise _PathError(f"{show_path(path)} is {show_value(value)}, not a mapping: nothing can be set inside it.")


def _index(items: list[Plain], key: str, path: KeyPath) -> int:
    if key.isdecimal():
        if int(key) < len(items):
            return int(key)
        raise _PathError(f"{show_path(path)} has {len(items)} items, counted from 0: no {key}.")
    names = [_name(entry) for entry in items]
    if key in names:
        return names.index(key)
    known = [n for n in names if n is not None]
    there = ", ".join(show_path([n]) for n in known)
    raise _PathError(f"{show_path(path)} has no item {key!r}; there are {there}.{did_you_mean(key, known)}")


def _name(entry: Plain) -> str | None:
    """Return the name of a list's item, given or taken from its path."""
    if isinstance(entry, Mapping):
        return entry.get("name") or _name(entry.get("path"))
    if not isinstance(entry, str):
        return None
    try:
        return parse_reference(entry).default_name()
    except (AddressError, ValueError):
        return entry
