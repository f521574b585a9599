"""Plain data → a `Recipe`, or everything that is wrong with it in plain words.

Independent of files, old forms or other tools' recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import ErrorDetails

from plait.errors import did_you_mean, join_words
from plait.folders import one_file
from plait.methods import METHODS
from plait.recipes.candidates import search_problems
from plait.recipes.paths import KeyPath, Plain, get_item
from plait.recipes.problems import Problem, show_value
from plait.recipes.schema import Recipe, named_method
from plait.recipes.shapes import bounds_at, field_names, is_number_only, model_at, spell_number, tags_at
from plait.stages import STAGES, place_of

#: Parameters as other tools call them: the key that means the same, and how to write it.
_ELSEWHERE = {
    "drop_rate": ("density", "Write density: it is 1 − drop_rate."),
    "p": ("density", "Write density: it is 1 − p, the share that is kept."),
    "k": ("density", "Write density: it is k / 100."),
    "majority_sign_method": ("sign", "Write sign."),
    "method_params": ("method", "Parameters go next to the method's name: method: {name: …, …}."),
}
_SECTIONS = ("output", "eval", "search", "tune", "calibration")  # of a recipe, each with keys of its own
_KINDS = {
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
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
_MANY = 12  # names; more of them are a wall of text
_BOUNDED = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "start with a letter or digit and hold only letters, digits, '.', '_' and '-'",
}
RecordT = TypeVar("RecordT", bound=BaseModel)


class _Draft(Recipe):
    """A recipe whose parts are valid each by itself."""

    @model_validator(mode="after")
    def _consistent(self) -> _Draft:
        return self


def check_recipe(data: Mapping[str, Plain]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe that `data` describes, or None and all that is wrong with it.

    Args:
        data: mappings with keys as text, lists and scalars.
    """
    if "method" in data:
        data = {**data, "method": named_method(data["method"])}
    problems = [*truth_values(data), *_name_problems(data)]
    try:
        draft = _Draft.model_validate(data)
    except ValidationError as error:
        problems += explain_errors(error, data)
    else:
        problems += [Problem(("method",), f"{text}.") for text in draft._method_problems()]
        if not problems and (draft.search.ranges or draft.search.points):
            named = {"method": draft.method_name, **data}  # a candidate has the default's parameters too
            problems += search_problems(named, draft.search, lambda candidate: check_recipe(candidate)[1])
    return (None, problems) if problems else (Recipe.model_validate(data), [])


def validate(kind: type[RecordT], data: Mapping[str, Plain]) -> tuple[RecordT | None, list[Problem]]:
    """Return the record that `data` describes, or None and all that is wrong with it in plain words.

    Args:
        kind: of the record.
        data: mappings with keys as text, lists and scalars.
    """
    problems = [*truth_values(data, kind)]
    try:
        return kind.model_validate(data), problems
    except ValidationError as error:
        return None, [*problems, *explain_errors(error, data, kind)]


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """Report that a key is not known, what is, and which is nearest."""
    known = f"allowed: {', '.join(allowed)}" if allowed else "nothing is allowed here"
    own, hint = _ELSEWHERE.get(key, ("", ""))  # the key that means the same here
    return f"{key!r} is not known here; {known}.{f' {hint}' if own in allowed else did_you_mean(key, allowed)}"


def truth_values(data: Mapping[str, Plain], root: type[BaseModel] = Recipe) -> Iterator[Problem]:
    """Find true and false where a number is wanted: pydantic would read them as 1 and 0."""
    for path, value in _scalars(data, ()):
        if isinstance(value, bool) and is_number_only(path, data, root):
            yield Problem(path, f"{_subject(path)} is {show_value(value)}; it must be a number.")


def _scalars(value: Plain, path: KeyPath) -> Iterator[tuple[KeyPath, Plain]]:
    if isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _scalars(inner, (*path, key))
    else:
        yield path, value


def _name_problems(data: Mapping[str, Plain]) -> Iterator[Problem]:
    """Find names that two adapters have, and names that no adapter has."""
    adapters = data.get("adapters")
    if not isinstance(adapters, list):
        return
    names = [get_item(entry, "name") for entry in adapters]
    for i, name in enumerate(names):
        before = [other for other in names[:i] if isinstance(name, str) and isinstance(other, str) and one_file(other, name)]
        if before:
            first = name if name in before else before[0]
            called = f"{name!r} too" if first == name else f"{first!r}, the same name to some file systems"
            text = f"adapters.{names.index(first)} is called {called}; give names (name: … or NAME=PATH)."
            yield Problem(("adapters", i, "name"), text)
    known = [name for name in names if isinstance(name, str)]
    for path in _uses(data) if len(known) == len(names) else ():
        if path[-1] not in known:
            name = str(path[-1])
            path = path if path[0] == "weights" else path[:-1]
            there = f"{name!r} is not an adapter of this recipe; there are {', '.join(dict.fromkeys(known))}."
            yield Problem(path, there + did_you_mean(name, known))


def _uses(data: Mapping[str, Plain]) -> Iterator[KeyPath]:
    """Yield where a recipe names an adapter; the name is the last key."""
    if isinstance(name := get_item(data.get("heads"), "adapter"), str):
        yield ("heads", "adapter", name)
    weights = data.get("weights")
    for key in ("adapters", "value", "default", "first", "last", "points"):
        yield from (("weights", key, name) for name in _keys(get_item(weights, key)))
    for key in ("layers", "modules"):
        inside = get_item(weights, key)
        yield from (("weights", key, part, name) for part in _keys(inside) for name in _keys(get_item(inside, part)))


def _keys(value: Plain) -> list[str]:
    return list(value) if isinstance(value, Mapping) else []


def explain_errors(error: ValidationError, data: Mapping[str, Plain], root: type[BaseModel] = Recipe) -> Iterator[Problem]:
    """Report what pydantic found in plain words, with what the schema allows there.

    Args:
        error: raised when `data` was validated.
        data: what was validated.
        root: the schema.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for found in error.errors(include_url=False):
        by_path.setdefault(_path(found, data), []).append(found)
    for path, errors in by_path.items():
        words = [e for e in errors if e["type"] == "literal_error"]
        alternative = ""  # a word that is allowed in place of a value
        if 0 < len(words) < len(errors):
            errors = [e for e in errors if e not in words]
            alternative = f", or {_words(words[0]['ctx']['expected'])[0]!r}"
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        kinds = [_KINDS[e["type"]] for e in errors if e["type"] in _KINDS]
        if kinds and not deeper:  # the members of a union each complain: one sentence for all
            wanted = " or ".join(dict.fromkeys(kinds)) + _keys_of(path, data, root, errors)
            yield Problem(path, f"{_subject(path)} is {show_value(errors[0]['input'])}; it must be {wanted}{alternative}.")
        for found in errors:
            # that items are too few is reported even when there are enough, of which some are invalid
            if found["type"] not in _KINDS and not (found["type"] == "too_short" and deeper):
                text = _sentence(found, path, data, root)
                yield Problem(path, text.removesuffix(".") + f"{alternative}." if alternative else text)


def _keys_of(path: KeyPath, data: Mapping[str, Plain], root: type[BaseModel], errors: Sequence[ErrorDetails]) -> str:
    """Report which keys a mapping has that something else was given in place of; an empty text where it is not a record."""
    if not any(e["type"] in ("model_type", "model_attributes_type") for e in errors):
        return ""
    model = model_at(path, data, root)
    names = field_names(model) if model else []
    value = errors[0]["input"]
    numbers = [n for n, f in (model.model_fields.items() if model else ()) if int in (f.annotation, *get_args(f.annotation))]
    example = f", such as {path[-1]}: {{{numbers[0]}: {value}}}" if numbers and type(value) is int else ""
    return f" with the keys {join_words(names, 'and')}{example}" if names else ""


def _path(error: ErrorDetails, data: Plain) -> KeyPath:
    """Return an error's place in the data; pydantic's own has the names of union members in between."""
    path: list[str | int] = []
    for key in error["loc"]:
        inside = key in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(key, int)
        if inside:
            path.append(key)
            data = get_item(data, key)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"].startswith("union_tag") and isinstance(data, Mapping):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _sentence(error: ErrorDetails, path: KeyPath, data: Mapping[str, Plain], root: type[BaseModel]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, data, root)
    if kind in ("missing", "union_tag_not_found"):
        return f"{_subject(path)!r} is missing.{_hint(path, data, root)}"
    if kind == "union_tag_invalid":
        return _not_among(context["tag"], path, _words(context["expected_tags"])) + _elsewhere(context["tag"], path)
    if kind == "literal_error":
        return _not_among(value, path, _values(context["expected"]))
    if kind in _BOUNDED:
        return f"{_subject(path)} is {show_value(value)}; it must be {bounds_at(path, data, root) or _first_bound(context)}."
    if kind == "string_pattern_mismatch":
        rule = _PATTERNS.get(context["pattern"], f"match {context['pattern']}")
        return f"{_subject(path)} is {show_value(value)}; it must {rule}."
    if kind in ("too_short", "string_too_short"):
        much = f"has only {len(value)}" if value else "is empty"
        return f"{_subject(path)} {much}; give at least {context['min_length']}."
    if kind == "value_error":
        return str(context["error"]).rstrip(".") + "."
    return f"{_subject(path)} is {show_value(value)}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def _unknown(path: KeyPath, data: Mapping[str, Plain], root: type[BaseModel]) -> str:
    key = str(path[-1])
    model = model_at(path[:-1], data, root)
    scale = " The factor on the merged delta is scale, next to the method." if path == ("method", "lambda") else ""
    problem = unknown_key(key, field_names(model) if model else [])
    if "?" in problem or scale:
        return problem + scale
    sections = {section: model_at((section,), {}) for section in _SECTIONS}
    if places := [f"{name}.{key}" for name, section in sections.items() if section and key in field_names(section)]:
        return f"{problem} Did you mean {join_words(places, 'or')}?"
    if len(path) == 1:
        return problem
    return problem + did_you_mean(key, [*Recipe.model_fields]).replace("?", ", a key of the recipe itself?")


def _hint(path: KeyPath, data: Mapping[str, Plain], root: type[BaseModel]) -> str:
    """Report what a missing value is, as the schema describes it."""
    model = model_at(path[:-1], data, root)
    fields = {f.alias or n: f for n, f in model.model_fields.items()} if model else {}
    about = fields[str(path[-1])].description if path and str(path[-1]) in fields else None
    if path == ("method", "name"):
        about = "`plait methods` lists the methods."
    elif not model and (names := tags_at(path[:-1], data, root)):
        about = f"Allowed: {', '.join(names)}."
    return f" {about}" if about else ""


def _not_among(value: Plain, path: KeyPath, allowed: Sequence[Plain]) -> str:
    texts = [a for a in allowed if isinstance(a, str)]
    known = join_words([show_value(a) for a in allowed], "or")
    if isinstance(value, str) and value not in texts and value in map(str, allowed):  # '1' and 1 look alike
        wanted = known if texts else f"one of the numbers {known}" if len(allowed) > 1 else f"the number {known}"
        return f"{_subject(path)} is the text {value!r}; it must be {wanted}. Write it without quotes: {value}."
    if not isinstance(value, str) and str(value) in texts:
        return f"{_subject(path)} is the number {value}; it must be {known}. Write it in quotes: {str(value)!r}."
    near = did_you_mean(str(value), texts)
    if near and len(allowed) > _MANY:  # the guess would come after a screen of names
        return f"{_subject(path)} is {show_value(value)}.{near} It must be {known}."
    return f"{_subject(path)} is {show_value(value)}; it must be {known}.{near}"


def _elsewhere(word: str, path: KeyPath) -> str:
    """Report where a stage or a method belongs that was given in another place of `method`."""
    if path[:1] != ("method",):
        return ""
    if path in (("method",), ("method", "name")):
        return f" {word!r} is a stage; spell a pipeline: method: {{{place_of(STAGES[word])}: …}}." if word in STAGES else ""
    if word in STAGES:
        return f" {word!r} is under '{place_of(STAGES[word])}'."
    if word in METHODS:
        return f" {word!r} is a method, not a stage: `plait methods {word}` prints the stages that it represents."
    return ""


def _first_bound(context: Mapping[str, Plain]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " and ".join(f"{signs[name]} {spell_number(bound)}" for name, bound in context.items() if name in signs)


def _words(expected: str) -> list[str]:
    """Read pydantic's list of allowed values: `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", expected) or [expected]


def _values(expected: str) -> list[Plain]:
    """Read pydantic's list of allowed values, texts and numbers: `'a', 1 or 2`."""
    found = re.findall(r"'([^']*)'|(-?\d+)(?=,|\s|$)", expected)
    return [int(number) if number else text for text, number in found] or [expected]


def _subject(path: KeyPath) -> str:
    """Name what a sentence is about: the last key, with its container when it is an index."""
    if not path:
        return "the recipe"
    names = [i for i, key in enumerate(path) if isinstance(key, str) and not key.isdecimal()]
    return ".".join(str(key) for key in path[names[-1] if names else 0 :])
