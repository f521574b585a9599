"""A recipe with values at the paths that a search changes: which paths there are, and what a candidate is.

Independent of how candidates are found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from plait.errors import RecipeError, did_you_mean
from plait.methods import METHODS
from plait.recipes.overrides import set_values
from plait.recipes.paths import KeyPath, Plain, get_item, is_number, read_path, show_path
from plait.recipes.problems import Problem, show_value
from plait.recipes.search import Range, SearchSpec

Point = Mapping[str, Any]
RecipeCheck = Callable[[dict[str, Plain]], Sequence[Problem]]

#: Parts of a recipe that a merge depends on, and that differ between candidates.
_PARTS = ("method", "scale", "weights", "adapters", "merge_mode", "transforms", "heads", "output", "seed")
_OUTPUT = ("rank", "dtype")
_EVERY = "adapters.*.weight"


@dataclass(frozen=True)
class SearchParameter:
    """One path of a recipe, and the values that it may have.

    Attributes:
        path: from the recipe's top, such as `method.density`.
        key: as its user spelled it.
        kind: `float`, `int` or `categorical`.
        low: smallest number; 0 of a choice.
        high: largest number.
        log: whether its logarithm is searched.
        choices: label → value; a label is the value itself, or its JSON where that is a list or a mapping.
    """

    path: str
    key: str
    kind: Literal["float", "int", "categorical"]
    low: float
    high: float
    log: bool
    choices: Mapping[Any, Plain]

    def holds(self, value: Plain) -> bool:
        """Whether a value is one of those that are searched."""
        if self.kind == "categorical":
            return label_of(value) in self.choices
        return is_number(value) and self.low <= value <= self.high and (self.kind == "float" or float(value).is_integer())

    @property
    def ends(self) -> tuple[Plain, ...]:
        """The values at its ends, or all of its choices."""
        if self.kind == "categorical":
            return tuple(self.choices.values())
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    @property
    def ordered(self) -> tuple[Plain, ...]:
        """Its choices: numbers in their order, others as they were given."""
        values = tuple(self.choices.values())
        return tuple(sorted(values, key=float)) if self.is_numeric else values

    @property
    def is_numeric(self) -> bool:
        """Whether all of its values are numbers, so that some are nearer to each other than others."""
        return self.kind != "categorical" or all(is_number(value) for value in self.choices.values())

    def at(self, unit: float) -> Plain:
        """Return the value at a place between 0 and 1."""
        if self.kind == "categorical":
            return self.ordered[min(int(unit * len(self.choices)), len(self.choices) - 1)]
        low, high = self._edges
        value = low + unit * (high - low)
        value = math.exp(value) if self.log else value
        if self.kind == "int":
            return int(min(max(round(value), self.low), self.high))
        return min(max(value, self.low), self.high)

    def unit(self, value: Plain) -> float:
        """Return the place between 0 and 1 of one of its values."""
        if self.kind == "categorical":
            return (self.ordered.index(value) + 0.5) / len(self.choices)
        low, high = self._edges
        return (self._scaled(float(value)) - low) / (high - low) if high > low else 0.5

    @cached_property
    def _edges(self) -> tuple[float, float]:
        """The ends, as they are searched; of integers half a step further, so that all have the same share."""
        half = 0.5 if self.kind == "int" else 0.0
        return self._scaled(self.low - half), self._scaled(self.high + half)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def label_of(value: Plain) -> Any:
    """Return what a value of a choice is called: itself, or its JSON where it is a list or a mapping."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, tuple, Mapping)) else value


def search_parameters(data: Mapping[str, Plain], spec: SearchSpec) -> tuple[SearchParameter, ...]:
    """Return the parameters of a search, the method first.

    Args:
        data: the recipe.
        spec: its `search`.
    """
    found = [p for key, given in spec.ranges.items() for p in _parameters(key, given, data)]
    return tuple(sorted(found, key=lambda p: p.path != "method"))


def _parameters(key: str, given: Range, data: Mapping[str, Plain]) -> Iterator[SearchParameter]:
    path = recipe_path(key)
    names = [str(name) for entry in data.get("adapters") or () if (name := get_item(entry, "name")) is not None]
    paths = [f"adapters.{show_path([name])}.weight" for name in names] if path == _EVERY else [path]
    for one in paths:
        if given.values is not None:
            yield SearchParameter(one, key, "categorical", 0.0, 0.0, log=False, choices={label_of(v): v for v in given.values})
        else:
            kind: Literal["float", "int"] = "int" if given.type == "int" or (given.type is None and _integral(one)) else "float"
            yield SearchParameter(one, key, kind, given.min or 0.0, given.max or 0.0, log=given.log, choices={})


def _integral(path: str) -> bool:
    """Return whether only integers are numbers at a path."""
    first, _, name = path.partition(".")
    if path in ("output.rank", "seed"):
        return True
    fields = [m.spec.model_fields[name] for m in METHODS.values() if first == "method" and name in m.spec.model_fields]
    return bool(fields) and all(field.annotation in (int, int | None) for field in fields)


def recipe_path(key: str) -> str:
    """Return the path that a key of `search` means: `density` is `method.density`, `rank` is `output.rank`.

    Raises:
        RecipeError: it is not a path.
    """
    first, *rest = read_path(key)
    if (first, *rest) == ("method", "name"):
        return "method"
    if first in _PARTS:
        return show_path([first, *rest])
    return show_path(["output" if first in _OUTPUT else "method", first, *rest])


def is_active(path: str, data: Mapping[str, Plain]) -> bool:
    """Whether a candidate has this path: parameters of a method are only of those that know them."""
    first, *rest = read_path(path)
    if first != "method" or not rest:
        return True
    name = value_at(data, "method")
    model = METHODS[name].spec if isinstance(name, str) and name in METHODS else None
    return model is None or rest[0] in {field.alias or key for key, field in model.model_fields.items()}


def candidate_data(data: Mapping[str, Plain], point: Point) -> tuple[dict[str, Plain], list[Problem]]:
    """Return a recipe with the values of a point, and what could not be set.

    Another method begins with its own defaults; the recipe's own keeps what the recipe gives it.

    Args:
        data: the recipe to start from.
        point: path → value.
    """
    method = point.get("method")
    others = {path: value for path, value in point.items() if path != "method"}
    changed = dict(data) if method in (None, value_at(data, "method")) else {**data, "method": method}
    result, _, problems = set_values(changed, others)
    return result, problems


def value_at(data: Mapping[str, Plain], path: str) -> Plain:
    """Return what a recipe has at a path; None where it has nothing. A method is its name."""
    value: Plain = data
    for key in read_path(path):
        if isinstance(value, list):
            by_name = {get_item(item, "name"): item for item in value}
            value = by_name.get(key, get_item(value, int(key)) if key.isdecimal() else None)
        else:
            value = get_item(value, key)
    return value.get("name", "pipeline") if path == "method" and isinstance(value, Mapping) else value


def zero_path(parameters: Sequence[SearchParameter]) -> str | None:
    """Return the path at which 0 is the base model; None where that is not searched."""
    return next((p.path for p in parameters if p.path in ("scale", "method.scale") and p.holds(0.0)), None)


def search_problems(data: Mapping[str, Plain], spec: SearchSpec, check: RecipeCheck) -> Iterator[Problem]:
    """Find paths that no candidate could have, and values that are not allowed there.

    Args:
        data: the recipe, valid without its search.
        spec: its `search`.
        check: reports what is wrong with a recipe without one.
    """
    base = {key: value for key, value in data.items() if key != "search"}
    bad = list(_path_problems(data, spec))
    yield from bad
    if bad:
        return
    parameters = search_parameters(base, spec)
    for parameter in parameters:
        yield from _value_problems(parameter, base, parameters, check, ("search", _section(parameter.key, spec), parameter.key))
    known = {p.path: p for p in parameters}
    if spec.zero_baseline and zero_path(parameters) is None:
        yield Problem(("search", "zero_baseline"), "scale 0 is not among the values that are searched (search.space.scale).")
    for number, point in enumerate(spec.points):
        for key, value in point.items():
            place: KeyPath = ("search", "points", number, key)
            owner = known.get(_safe_path(key))
            if owner is None:
                there = ", ".join(p.key for p in parameters)
                yield Problem(
                    place, f"{key!r} is not searched; there are {there}.{did_you_mean(key, [p.key for p in parameters])}"
                )
            elif not owner.holds(value):
                yield Problem(place, f"{show_value(value)} is not among the values that are searched.")
    early = spec.early_stop
    for key in early.resolution if early is not None else ():
        if (owner := known.get(_safe_path(key))) is None or owner.kind == "categorical":
            yield Problem(("search", "early_stop", "resolution", key), f"{key!r} is not a range that is searched.")


def _section(key: str, spec: SearchSpec) -> str:
    return "space" if key in spec.space else "grid"


def _safe_path(key: str) -> str:
    try:
        return recipe_path(key)
    except RecipeError:
        return key


def _path_problems(data: Mapping[str, Plain], spec: SearchSpec) -> Iterator[Problem]:
    """Find keys that cannot be read, that a merge does not depend on, or that mean the same as another."""
    seen: dict[str, str] = {}
    for key in spec.ranges:
        place: KeyPath = ("search", _section(key, spec), key)
        try:
            path = recipe_path(key)
        except RecipeError as error:
            yield Problem(place, str(error))
            continue
        first, *rest = read_path(path)
        if path in seen:
            yield Problem(place, f"{key!r} and {seen[path]!r} mean the same; keep one.")
        seen[path] = key
        if first == "adapters" and (len(rest) != 2 or rest[1] != "weight"):
            yield Problem(place, f"{key!r} is not searched: of adapters only weights are, adapters.NAME.weight or {_EVERY}.")
        elif first == "output" and (len(rest) != 1 or rest[0] not in _OUTPUT):
            yield Problem(place, f"{key!r} is not searched: of the output only {' and '.join(_OUTPUT)} are.")
        elif first == "method" and rest:
            names = {field.alias or n for m in METHODS.values() for n, field in m.spec.model_fields.items()}
            if rest[0] not in names:
                near = did_you_mean(rest[0], [*names, *_PARTS])
                yield Problem(
                    place, f"{key!r} is neither a part of a merge ({', '.join(_PARTS)}) nor a parameter of a method.{near}"
                )


def _value_problems(
    parameter: SearchParameter,
    data: dict[str, Plain],
    parameters: Sequence[SearchParameter],
    check: RecipeCheck,
    place: KeyPath,
) -> Iterator[Problem]:
    """Find values that no method of the search allows, and a path that none of them has."""
    method = next((p for p in parameters if p.path == "method" and p is not parameter), None)
    methods = [data] if method is None else [candidate_data(data, {"method": value})[0] for value in method.ends]
    starts = [start for start in methods if is_active(parameter.path, start)]
    if not starts:
        names = dict.fromkeys(str(value_at(start, "method")) for start in methods)
        yield Problem(place, f"no method of this search ({', '.join(names)}) has {parameter.path}.")
    for value in parameter.ends:
        found: list[Problem] = []
        for start in starts:
            changed, dead_ends = candidate_data(start, {parameter.path: value})
            found = [*dead_ends, *check(changed)]
            if not found:
                break
        if found:
            yield Problem(place, f"at {show_value(value)}: {found[0].text}")
            return  # the other end is often wrong in the same way
