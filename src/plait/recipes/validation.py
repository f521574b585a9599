"""Plain data → a `Recipe`, or everything that is wrong with it in plain words.

Knows nothing of files, old forms or other tools' recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from plait.errors import did_you_mean
from plait.recipes.paths import KeyPath, Plain, item
from plait.recipes.problems import Problem, listed, show
from plait.recipes.schema import Recipe
from plait.recipes.shapes import bounds_at, field_names, is_number_only, model_at, spell_number

#: Parts of a recipe that are planned, and what they are for.
PLANNED = {"tasks": "evaluate", "eval": "evaluate", "tune": "learn coefficients", "search": "search"}
_KINDS = {
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDED = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "start with a letter or digit and hold only letters, digits, '.', '_' and '-'",
}


class _Draft(Recipe):
    """A recipe whose parts are valid each by itself."""

    @model_validator(mode="after")
    def _consistent(self) -> _Draft:
        return self


def check(data: Mapping[str, Plain]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe that `data` describes, or None and all that is wrong with it.

    Args:
        data: mappings with keys as text, lists and scalars.
    """
    problems = [*_truth_values(data, (), data), *_name_problems(data)]
    try:
        draft = _Draft.model_validate(data)
    except ValidationError as error:
        problems += _explain(error, data)
    else:
        problems += [Problem(("method",), f"{text}.") for text in draft._method_problems()]
    return (None, problems) if problems else (Recipe.model_validate(data), [])


def cannot_yet(what: str) -> str:
    """Say that this version merges and cannot do `what`."""
    return f"this version of plait merges adapters; it cannot {what} yet. Take this part out."


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """Say that a key is not known, what is, and which is nearest."""
    known = f"allowed: {', '.join(allowed)}" if allowed else "nothing is allowed here"
    return f"{key!r} is not known here; {known}.{did_you_mean(key, allowed)}"


def _truth_values(value: Plain, path: KeyPath, data: Plain) -> Iterator[Problem]:
    """Find true and false where a number is wanted: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        if is_number_only(path, data):
            yield Problem(path, f"{_subject(path)} is {show(value)}; it must be a number.")
    elif isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _truth_values(inner, (*path, key), data)


def _name_problems(data: Mapping[str, Plain]) -> Iterator[Problem]:
    """Find names that two adapters have, and names that no adapter has."""
    adapters = data.get("adapters")
    if not isinstance(adapters, list):
        return
    names = [item(entry, "name") for entry in adapters]
    for i, name in enumerate(names):
        if isinstance(name, str) and name in names[:i]:
            text = f"adapters.{names.index(name)} is called {name!r} too; give names (name: … or NAME=PATH)."
            yield Problem(("adapters", i, "name"), text)
    known = [name for name in names if isinstance(name, str)]
    for path in _uses(data) if len(known) == len(names) else ():
        if path[-1] not in known:
            name = str(path[-1])
            path = path if path[0] == "weights" else path[:-1]
            there = f"{name!r} is no adapter of this recipe; there are {', '.join(dict.fromkeys(known))}."
            yield Problem(path, there + did_you_mean(name, known))


def _uses(data: Mapping[str, Plain]) -> Iterator[KeyPath]:
    """Yield where a recipe speaks of an adapter by name; the name is the last key."""
    if isinstance(name := item(data.get("heads"), "adapter"), str):
        yield ("heads", "adapter", name)
    weights = data.get("weights")
    for key in ("adapters", "value", "default"):
        yield from (("weights", key, name) for name in _keys(item(weights, key)))
    for key in ("layers", "modules"):
        inside = item(weights, key)
        yield from (("weights", key, part, name) for part in _keys(inside) for name in _keys(item(inside, part)))


def _keys(value: Plain) -> list[str]:
    return list(value) if isinstance(value, Mapping) else []


def _explain(error: ValidationError, data: Mapping[str, Plain]) -> Iterator[Problem]:
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for found in error.errors(include_url=False):
        by_path.setdefault(_path(found, data), []).append(found)
    for path, errors in by_path.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        kinds = [_KINDS[e["type"]] for e in errors if e["type"] in _KINDS]
        if kinds and not deeper:  # the members of a union each complain: one sentence for all
            wanted = " or ".join(dict.fromkeys(kinds))
            yield Problem(path, f"{_subject(path)} is {show(errors[0]['input'])}; it must be {wanted}.")
        for found in errors:
            # that items are too few is said even when there are enough, of which some are invalid
            if found["type"] not in _KINDS and not (found["type"] == "too_short" and found["input"]):
                yield Problem(path, _sentence(found, path, data))


def _path(error: ErrorDetails, data: Plain) -> KeyPath:
    """Return an error's place in the data; pydantic's own has the names of union members in between."""
    path: list[str | int] = []
    for key in error["loc"]:
        inside = key in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(key, int)
        if inside:
            path.append(key)
            data = item(data, key)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"].startswith("union_tag") and isinstance(data, Mapping):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _sentence(error: ErrorDetails, path: KeyPath, data: Mapping[str, Plain]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, data)
    if kind in ("missing", "union_tag_not_found"):
        return f"{_subject(path)!r} is missing.{_hint(path, data)}"
    if kind == "union_tag_invalid":
        return _not_among(context["tag"], path, _words(context["expected_tags"]))
    if kind == "literal_error":
        return _not_among(value, path, _words(context["expected"]))
    if kind in _BOUNDED:
        return f"{_subject(path)} is {show(value)}; it must be {bounds_at(path, data) or _first_bound(context)}."
    if kind == "string_pattern_mismatch":
        rule = _PATTERNS.get(context["pattern"], f"match {context['pattern']}")
        return f"{_subject(path)} is {show(value)}; it must {rule}."
    if kind in ("too_short", "string_too_short"):
        return f"{_subject(path)} is empty; give at least {context['min_length']}."
    if kind == "value_error":
        return str(context["error"]).rstrip(".") + "."
    return f"{_subject(path)} is {show(value)}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _unknown(path: KeyPath, data: Mapping[str, Plain]) -> str:
    key = str(path[-1])
    if len(path) == 1 and key in PLANNED:
        return cannot_yet(PLANNED[key])
    model = model_at(path[:-1], data)
    return unknown_key(key, field_names(model) if model else [])


def _hint(path: KeyPath, data: Mapping[str, Plain]) -> str:
    """Say what a missing value is, as the schema describes it."""
    model = model_at(path[:-1], data)
    fields = {f.alias or n: f for n, f in model.model_fields.items()} if model else {}
    about = fields[str(path[-1])].description if path and str(path[-1]) in fields else None
    return f" {about}" if about else ""


def _not_among(value: Plain, path: KeyPath, allowed: Sequence[str]) -> str:
    near = did_you_mean(str(value), allowed)
    return f"{_subject(path)} is {show(value)}; it must be {listed([_quoted(a) for a in allowed], 'or')}.{near}"


def _quoted(word: str) -> str:
    return word if word.isdecimal() else repr(word)


def _first_bound(context: Mapping[str, Plain]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " and ".join(f"{signs[name]} {spell_number(bound)}" for name, bound in context.items() if name in signs)


def _words(expected: str) -> list[str]:
    """Read pydantic's list of allowed values: `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", expected) or [expected]


def _subject(path: KeyPath) -> str:
    """Name what a sentence is about: the last key, with what it stands in when it is an index."""
    if not path:
        return "the recipe"
    names = [i for i, key in enumerate(path) if isinstance(key, str) and not key.isdecimal()]
    return ".".join(str(key) for key in path[names[-1] if names else 0 :])
